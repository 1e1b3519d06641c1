"""The ZeRO engine's parts: layout -> stage -> cut -> unit -> schedule -> clip, each knowing only those before it."""
