"""Writing a checkpoint, by the ranks themselves or beside training by one writer process per rank.

job            the work order for one rank's part
snapshot       the copy in shared memory that is written while training continues
writer_handle  the rank's handle on its writer process; writer: the process; priority: its CPU priority;
               protocol: their messages; writer_group: the writers of all ranks, who meet at a socket
commit         every rank writes its part, and a rename completes the checkpoint
"""
