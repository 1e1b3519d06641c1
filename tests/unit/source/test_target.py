"""TARGET: what is a run, what is another box."""

from __future__ import annotations

import pytest

from zerotop.output import CommandError
from zerotop.source.target import Target, parse_target


@pytest.mark.parametrize(
    ("text", "host", "run"),
    [
        (None, None, None),
        ("", None, None),
        ("quiet-otter.2", None, "quiet-otter.2"),
        ("me@gpu-box", "me@gpu-box", None),
        ("me@gpu-box:", "me@gpu-box", None),
        ("me@gpu-box:q1", "me@gpu-box", "q1"),
        ("gpu-box:q1", "gpu-box", "q1"),
        ("me@10.0.0.7:q1", "me@10.0.0.7", "q1"),
        ("me@[fe80::1%eth0]:q1", "me@fe80::1%eth0", "q1"),
        ("[::1]:", "::1", None),
    ],
)
def test_targets(text: str | None, host: str | None, run: str | None) -> None:
    assert parse_target(text) == Target(host, run)


@pytest.mark.parametrize(
    "text", ["@", "me@", "@box", "a@b@c", "a b@c", ":q1", "-oProxyCommand=x@box", "-x:q1", "me@/etc"]
)
def test_refused(text: str) -> None:
    with pytest.raises(CommandError):
        parse_target(text)
