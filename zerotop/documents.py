"""The state of a run as the documents and texts that `status` and `ls` print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.wire.messages import LIVE_STATES, CommandRecord, StepResult
from runtime.wire.node import NodeStats
from zerotop.format import (
    MISSING,
    bytes_text,
    clock_text,
    count_text,
    duration_text,
    energy_text,
    figure_text,
    ms_text,
    rate_text,
    time_text,
)
from zerotop.output import table, with_exit_code
from zerotop.rundir.notes import read_notes
from zerotop.state.condition import Condition, condition_of
from zerotop.state.efficiency import Efficiency, rank_efficiency, run_efficiency
from zerotop.state.evaluations import Evaluations, evaluation_text, perplexity
from zerotop.state.forecast import forecast
from zerotop.state.gpu import Concern, concerns
from zerotop.state.memory import gpu_of, memory_use, planned_peak
from zerotop.state.progress import progress
from zerotop.state.roofline import run_ceiling
from zerotop.state.run import RankState, RunState, waits_for

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry


# ---- status ----------------------------------------------------------------------------------------------------
def status_document(state: RunState, entry: RunEntry | None = None, *, connection: str = "live") -> dict[str, Any]:
    """The output of `status --json`. `entry` adds where the run is, and stands in for a hub that has not answered;
    `connection` is that of the source."""
    status = state.status or (entry.status if entry else None)
    hello = state.hello
    newest, report = _newest_step(state), state.time_report
    how_far, condition = progress(state, connection), _condition(state, entry, connection)
    energy, found = state.energy_use(), concerns(state)
    efficiency, ceiling = run_efficiency(state), run_ceiling(state)
    return {
        "name": status.name if status else "",
        "state": status.state if status else state.state_name,
        "step": max(how_far.step, status.step if status else 0),
        "steps": how_far.steps if how_far.steps is not None else planned_steps(entry),
        "loss": newest.loss if newest else None,
        "loss_step": newest.step if newest else None,
        "lr": newest.lr if newest else None,
        "grad_norm": newest.grad_norm if newest else None,
        "evaluation": evaluation_document(state.evaluations),
        "tokens_per_s": how_far.tokens_per_s,
        "step_ms": how_far.step_ms,
        "eta_s": how_far.eta_s,
        **_efficiency_document(efficiency),
        "peak_note": efficiency.note,
        "ceiling": ceiling.name if ceiling else None,
        "ceiling_text": ceiling.text if ceiling else "",
        "condition": condition.name,
        "condition_text": condition.text,
        "attempt": status.attempt if status else 0,
        "stage": hello.stage if hello else None,
        "trainer": hello.trainer if hello else "",
        "precision": hello.precision if hello else None,
        "reason": status.reason if status else "",
        "error": status.error if status else "",
        "failed_rank": status.failed_rank if status else None,
        "exit_code": status.exit_code if status else None,
        "last_checkpoint_step": status.last_checkpoint_step if status else None,
        "restarts": status.restarts if status else 0,
        "restart_reason": status.restart_reason if status else "",
        "lost_steps": status.lost_steps if status else 0,
        "started_wall_s": status.started_wall_s if status else None,
        "ended_wall_s": status.ended_wall_s if status else None,
        "folder": str(entry.path) if entry else None,
        "zero": None
        if hello is None or hello.planned is None
        else {"saved_bytes": hello.planned.saved_bytes, "text": hello.planned.comparison},
        "memory_forecast": [need.document() for need in forecast(state)],
        "verdict": verdict_document(state),
        "alerts": [alert.model_dump(exclude={"kind"}) for alert in state.alerts.values()],
        "collectives": [] if report is None else [kind.model_dump() for kind in report.transfers],
        "energy": None if energy is None else dataclasses.asdict(energy),
        "ranks": [
            {
                **_rank_document(state, rank, found.get(number, ())),
                "parts_ms": report.parts_ms.get(number) if report is not None else None,
            }
            for number, rank in sorted(state.ranks.items())
        ],
        "nodes": [_node_document(state, node) for _, node in sorted(state.nodes.items())],
        "commands": [command_document(record) for record in state.commands.values()],
    }


def verdict_document(state: RunState) -> dict[str, Any] | None:
    """The hub's newest verdict; None before the first."""
    verdict = state.verdict
    return verdict.model_dump(exclude={"kind"}) if verdict is not None else None


def _verdict_lines(document: dict[str, Any]) -> list[str]:
    """The verdict on a live run, and what to do; what became of one that has ended is in the headline."""
    verdict = document["verdict"]
    if verdict is None or document["state"] not in LIVE_STATES or document["condition"] == "unknown":
        return []
    return [verdict["text"], *([f"  {verdict['advice']}"] if verdict["advice"] else [])]


def _alert_lines(document: dict[str, Any]) -> list[str]:
    """The alerts of a live run that fire."""
    if document["state"] not in LIVE_STATES:
        return []
    firing = [alert for alert in document["alerts"] if alert["state"] == "firing"]
    return [f"alert: {alert['name']}: {alert['text']} (since {clock_text(alert['since_wall_s'])})" for alert in firing]


def evaluation_document(evaluations: Evaluations) -> dict[str, Any] | None:
    """The newest evaluation and the best one; None before the first."""
    newest, best = evaluations.newest, evaluations.best
    if newest is None:
        return None
    return {
        "step": newest.step,
        "loss": newest.loss,
        "perplexity": perplexity(newest.loss),
        "tokens": newest.tokens,
        "samples": newest.samples,
        "best_step": best.step if best is not None else newest.best_step,
        "best_loss": best.loss if best is not None else None,
        "best_perplexity": perplexity(best.loss) if best is not None else None,
        "text": evaluation_text(newest, best),
        "generations": [text.model_dump() for text in newest.generations],
    }


def _efficiency_document(efficiency: Efficiency) -> dict[str, Any]:
    return {"model_tflops": efficiency.tflops, "mfu": efficiency.mfu, "hfu": efficiency.hfu}


def _condition(state: RunState, entry: RunEntry | None, connection: str) -> Condition:
    if state.status is not None or entry is None:
        return condition_of(state, connection)
    if entry.live and entry.status.state != "starting":
        return Condition("unknown", f"the supervisor does not answer ({connection})")
    return Condition(entry.status.state)


def _newest_step(state: RunState) -> StepResult | None:
    return max((rank.step for rank in state.ranks.values() if rank.step), key=lambda step: step.step, default=None)


_NODE_FIGURES = (
    *("cpu_percent", "cpu_count", "load_1m", "ram_used_bytes", "ram_total_bytes", "ram_available_bytes"),
    *("cgroup_limit_bytes", "cgroup_used_bytes", "page_cache_bytes", "shared_memory_bytes"),
    *("memory_pressure_percent", "swap_used_bytes", "swap_in_bytes_per_s", "swap_out_bytes_per_s", "run_rss_bytes"),
)


def _node_document(state: RunState, node: NodeStats) -> dict[str, Any]:
    """A node's figures, and what its ranks hold of page-locked memory: as requested, and as it was really taken."""
    memories = [
        rank.memory
        for rank in state.ranks.values()
        if rank.memory is not None and rank.hello is not None and rank.hello.host == node.host
    ]
    return {
        "host": node.host,
        **{name: getattr(node, name) for name in _NODE_FIGURES},
        "pinned_requested_bytes": sum(memory.pinned_requested_bytes for memory in memories),
        "pinned_bytes": sum(memory.pinned_bytes for memory in memories),
        "gpu_note": node.gpu_note,
        "gpus": None if node.gpus is None else [gpu.model_dump() for gpu in node.gpus],
    }


def _rank_document(state: RunState, rank: RankState, found: Sequence[Concern]) -> dict[str, Any]:
    heartbeat, step, memory, hello = rank.heartbeat, rank.step, rank.memory, rank.hello
    # A rank that was killed sent no goodbye, and its last heartbeat would stay for ever.
    over = rank.goodbye is not None or state.state_name not in LIVE_STATES
    ended = over and rank.goodbye is None
    figures: dict[str, Any] = {}
    if memory is not None:
        figures = {
            **{str(name): 0 for name in memory.ledger},
            # Some derived, not counted: see zerotop/state/memory.py.
            **dict(memory_use(memory).parts),
            "offloaded": {str(name): size for name, size in memory.offloaded.items() if size},
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "device_used_bytes": memory.device_used_bytes,
            "device_total_bytes": memory.device_total_bytes,
            "rss_bytes": memory.rss_bytes,
            "untouched_bytes": memory.untouched_bytes,
            "major_faults": memory.major_faults,
            "alloc_retries": memory.alloc_retries,
            "inactive_split_bytes": memory.inactive_split_bytes,
            "peak_bytes": {str(phase): size for phase, size in memory.peak_bytes.items()},
            "activation_peak_bytes": {str(phase): size for phase, size in memory.activation_bytes.items()},
            "unit_activations": {
                kind: {"units": count, "bytes": size} for kind, (count, size) in memory.unit_activations.items()
            },
            "planned_peak_bytes": planned_peak(memory, hello.planned if hello is not None else None),
            "pinned_bytes": memory.pinned_bytes,
            "pinned_requested_bytes": memory.pinned_requested_bytes,
            "host_total_bytes": memory.host_total_bytes,
        }
    gpu = gpu_of(state, rank)
    return {
        "rank": rank.rank,
        "phase": "ended" if ended else rank.phase,
        "micro_step": heartbeat.micro_step if heartbeat and not over else None,
        "micro_steps": heartbeat.micro_steps if heartbeat else hello.accumulation if hello else None,
        "step": step.step if step else None,
        "host": hello.host if hello else None,
        "pid": hello.pid if hello else None,
        "device": hello.device if hello else None,
        "memory": figures,
        "gpu": None if gpu is None else gpu.model_dump(),
        "gpu_concerns": [concern.text for concern in found],
        "wait_ms": step.wait_ms if step else None,
        "step_ms": step.step_ms if step else None,
        "tokens_per_s": step.tokens_per_s if step else None,
        **_efficiency_document(rank_efficiency(state, rank)),
        "age_s": max(0.0, (state.hub_now_ns - rank.heard_ns) / 1e9) if rank.heard_ns and state.hub_now_ns else None,
    }


def command_document(record: CommandRecord) -> dict[str, Any]:
    """The output of a control command with --json."""
    command, ack = record.command, record.ack
    return {
        "command": command.name,
        "arguments": command.arguments,
        "who": command.who,
        "id": command.id,
        "number": ack.number or command.number,
        "state": ack.state,
        "step": ack.step,
        "reason": ack.reason,
        "waits_for": waits_for(record) if ack.state == "accepted" else "",
        "result": ack.result,
    }


def status_text(document: dict[str, Any]) -> str:
    """A status document as text."""
    lines = [*_verdict_lines(document), *_alert_lines(document), _headline(document)]
    if document["loss"] is not None:
        figures = (("loss", document["loss"]), ("lr", document["lr"]), ("norm", document["grad_norm"]))
        parts = [f"{name} {figure_text(value)}" for name, value in figures]
        if document["tokens_per_s"] is not None:
            parts.append(rate_text(document["tokens_per_s"]))
        if document["loss_step"] < document["step"]:  # the recording ends before the run did
            parts.append(f"(of step {document['loss_step']}, the last one recorded)")
        lines.append("  ".join(parts))
        lines += _speed_lines(document)
    if document["evaluation"] is not None:
        lines.append(document["evaluation"]["text"])
    if document["last_checkpoint_step"] is not None:
        lines.append(f"newest checkpoint: step {document['last_checkpoint_step']}")
    if document["restarts"]:
        lines.append(_restarts_text(document))
    for rank in document["ranks"]:
        lines += [f"GPU {rank['gpu']['index']} (rank {rank['rank']}): {text}" for text in rank["gpu_concerns"]]
    if document["energy"] is not None:
        lines.append(_energy_line(document["energy"]))
    if document["zero"] is not None:
        lines.append(document["zero"]["text"])
    lines += [f"next: {need['text']}" for need in document["memory_forecast"] if need["certain"]][:1]
    if document["ranks"]:
        lines += ["", _ranks_text(document["ranks"])]
    for command in document["commands"]:
        if command["state"] == "accepted":
            lines.append(f"#{command['number']} {command['command']}: {command['waits_for']}")
    if document["error"]:
        failed = document["failed_rank"]
        lines += ["", f"error of rank {failed}:" if failed is not None else "error:", document["error"].rstrip()]
    return "\n".join(lines)


def _speed_lines(document: dict[str, Any]) -> list[str]:
    """What the devices achieve, and which ceiling binds, as far as it is known."""
    found = []
    if document["model_tflops"] is not None:
        figures = (document["model_tflops"], document["mfu"], document["hfu"], document["peak_note"])
        found.append(f"{Efficiency(*figures).text}, mean per device")
    if document["ceiling_text"] and document["condition"] == "running":
        found.append(f"ceiling: {document['ceiling_text']}")
    return found


def _headline(document: dict[str, Any]) -> str:
    of = f" of {document['steps']}" if document["steps"] is not None else ""
    now = f" ({document['condition']}: {document['condition_text']})" if document["condition_text"] else ""
    parts = [f"{document['name']}: {document['state']}{now}", f"step {document['step']}{of}"]
    if document["stage"] is not None:
        how = document["trainer"] or f"ZeRO-{document['stage']}"
        parts.append(f"{how} {document['precision']}".strip())
    if document["eta_s"] is not None:
        parts.append(f"{duration_text(document['eta_s'])} to go")
    if document["reason"]:
        code = document["exit_code"] if document["state"] == "failed" else None
        parts.append(with_exit_code(document["reason"], code))
    return ", ".join(parts)


def _energy_line(energy: dict[str, Any]) -> str:
    tokens = energy["joules_per_million_tokens"]
    million = f", {energy_text(tokens)} per million tokens" if tokens is not None else ""
    return f"energy {energy_text(energy['joules_per_step'])} per step{million}, GPUs {energy['power_w']:,.0f} W"


def _restarts_text(document: dict[str, Any]) -> str:
    times = "once" if document["restarts"] == 1 else f"{document['restarts']} times, last"
    lost = document["lost_steps"]
    again = f"; {lost} step{'s' * (lost > 1)} replayed" if lost else ""
    return f"restarted {times} because {document['restart_reason']}{again}"


def _ranks_text(ranks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for rank in ranks:
        memory = rank["memory"]
        used = memory.get("device_used_bytes") or memory.get("allocated_bytes")
        micro = f" {rank['micro_step']}/{rank['micro_steps']}" if rank["micro_step"] else ""
        rows.append(
            (
                str(rank["rank"]),
                rank["host"] or MISSING,
                rank["device"] or MISSING,
                f"{rank['phase']}{micro}",
                MISSING if rank["step"] is None else str(rank["step"]),
                bytes_text(used),
                bytes_text(memory.get("rss_bytes")),
                ms_text(rank["wait_ms"]),
                count_text(rank["tokens_per_s"]),
            )
        )
    header = ("RANK", "HOST", "DEVICE", "PHASE", "STEP", "VRAM", "RSS", "WAIT", "TOKENS/s")
    return table(header, rows, right=(0, 4, 5, 6, 7, 8))


# ---- ls --------------------------------------------------------------------------------------------------------
def list_document(entries: Sequence[RunEntry]) -> list[dict[str, Any]]:
    """The output of `ls --json`, from the run directories alone: the step is as recent as state.json."""
    return [
        {
            "name": entry.name,
            "state": entry.status.state,
            "step": entry.status.step,
            "steps": planned_steps(entry),
            "attempt": entry.status.attempt,
            "host": entry.run.host,
            "nproc": entry.run.nproc,
            "device": entry.run.device,
            "started": time_text(_started(entry)),
            "started_wall_s": _started(entry),
            "ended_wall_s": entry.status.ended_wall_s,
            "last_checkpoint_step": entry.status.last_checkpoint_step,
            "restarts": entry.status.restarts,
            "restart_reason": entry.status.restart_reason,
            "reason": entry.status.reason,
            "note": notes[-1].text if (notes := read_notes(entry.path)) else "",
            "branch_of": entry.run.branch_of.run if entry.run.branch_of else None,
            "folder": str(entry.path),
        }
        for entry in entries
    ]


def list_text(document: Sequence[dict[str, Any]]) -> str:
    """A list document as text."""
    noted = any(run["note"] for run in document)
    rows = [
        (
            run["name"],
            run["state"],
            f"{run['step']}" + (f"/{run['steps']}" if run["steps"] is not None else ""),
            f"{run['nproc']} {run['device']}",
            run["host"],
            run["started"][:16].replace("T", " "),
            _why(run),
            *([run["note"]] if noted else []),
        )
        for run in document
    ]
    header = ("NAME", "STATE", "STEP", "RANKS", "HOST", "STARTED", "WHY", *(["NOTE"] if noted else []))
    return table(header, rows, right=(2,))


def _why(run: dict[str, Any]) -> str:
    """Why the run is in its state; a run that continues after a restart says so."""
    count = run["restarts"]
    restarts = f"{count} restart{'s' * (count > 1)}" if count else ""
    if not run["reason"]:
        return f"{restarts}: {run['restart_reason']}" if restarts else ""
    return f"{run['reason']} ({restarts})" if restarts and run["state"] in ("finished", "stopped") else run["reason"]


def _started(entry: RunEntry) -> float:
    started = entry.status.started_wall_s
    return entry.run.created_wall_s if started is None else started


def planned_steps(entry: RunEntry | None) -> int | None:
    """Optimizer steps of the run according to its resolved config; None if a script decides."""
    if entry is None or entry.run.script is not None:
        return None
    try:
        resolved = json.loads((entry.path / "resolved.json").read_bytes())
        steps = resolved["zerotop"]["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a launch that was interrupted has not written it
    return steps if isinstance(steps, int) else None
