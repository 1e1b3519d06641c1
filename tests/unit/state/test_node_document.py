"""What `zerotop status --json` says of a node."""

from __future__ import annotations

from tests.tui.scripted_run import ScriptedRun
from zerotop.documents import status_document


def test_status_gives_a_nodes_memory_and_what_its_ranks_have_pinned() -> None:
    run = ScriptedRun(ranks=4, nodes=2, gpu=True)
    run.steps(3)
    run.node()
    for rank in (0, 1):
        memory = run.state.ranks[rank].memory
        assert memory is not None
        run.say(memory.model_copy(update={"pinned_requested_bytes": 1000, "pinned_bytes": 4096}))
    documents = {node["host"]: node for node in status_document(run.state)["nodes"]}
    hello = run.state.ranks[0].hello
    assert hello is not None
    mine = documents[hello.host]
    assert (mine["pinned_requested_bytes"], mine["pinned_bytes"]) == (2000, 8192)
    assert mine["ram_total_bytes"] == run.state.nodes[hello.host].ram_total_bytes and len(documents) == 2
