"""Warnings about memory: each is said once, and again only if it had been mended."""

from __future__ import annotations

from tests.unit.diagnose.test_hang import PlayedHub
from tests.unit.state.test_forecast import GIB, a_run, memory, node
from zerotop.diagnose.memorywatch import SAID_AGAIN_S, MemoryWatch
from zerotop.documents import status_document, status_text


def test_a_coming_shortage_is_said_once_until_there_was_room_again() -> None:
    run = a_run(free=10 * GIB)
    hub = PlayedHub(run)
    watch = MemoryWatch(hub)  # type: ignore[arg-type]
    watch.look()
    watch.look()
    assert [(event.what, event.severity) for event in hub.events] == [("memory", "warning")]
    assert "will be written through slots" in hub.events[0].text
    assert hub.events[0].data["need_bytes"] == 16 * GIB and hub.events[0].data["event"] == "checkpoint"
    run.apply(node(free=40 * GIB))
    watch.look()
    run.apply(node(free=9 * GIB))
    watch.look()
    assert len(hub.events) == 2 and "9.00 GiB are free" in hub.events[1].text


def test_what_somebody_would_have_to_ask_for_is_no_warning() -> None:
    hub = PlayedHub(a_run(free=GIB, offloaded={"snapshot": 8 * GIB}))
    MemoryWatch(hub).look()  # type: ignore[arg-type]
    assert hub.events == []


def test_fragmentation_is_an_event_and_not_repeated_every_second() -> None:
    run = a_run(free=90 * GIB)
    hub = PlayedHub(run)
    watch = MemoryWatch(hub)  # type: ignore[arg-type]
    gpu = {"allocated_bytes": 60 * GIB, "reserved_bytes": 72 * GIB, "inactive_split_bytes": 6 * GIB}
    for retries in (0, 2, 3, 4):
        run.apply(memory(1, **gpu, alloc_retries=retries))
        watch.look()
    assert [(event.what, event.data["rank"]) for event in hub.events] == [("fragmentation", 1)]
    for _ in range(round(SAID_AGAIN_S)):
        watch.look()
    assert len(hub.events) == 1, "no retry since"
    run.apply(memory(1, **gpu, alloc_retries=9))
    watch.look()
    assert len(hub.events) == 2 and "tried again 5 times" in hub.events[1].text


def test_status_has_the_forecast_the_peaks_and_what_zero_saves() -> None:
    run = a_run(10 * GIB, rss_parts={"imports": GIB, "libraries": GIB // 2}, peak_bytes={"backward": 20 * GIB})
    document = status_document(run)
    assert document["zero"] == {"saved_bytes": GIB, "text": "ZeRO saves 1 GiB"}
    assert document["memory_forecast"][0]["event"] == "checkpoint" and document["memory_forecast"][0]["short"]
    held = document["ranks"][0]["memory"]
    assert held["imports"] == GIB and held["peak_bytes"] == {"backward": 20 * GIB}
    assert held["planned_peak_bytes"] == 14 * GIB + GIB // 2
    text = status_text(document)
    assert "ZeRO saves 1 GiB" in text and "next: the checkpoint at step 500 will need 16.0 GiB" in text
