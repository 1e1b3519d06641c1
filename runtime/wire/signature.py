"""Signatures of what the ranks of a run send each other.

[Note: signed values]
Gloo accepts the first process that connects to a rank's port, and on one node every local user can connect. The ranks
of a run share a secret that the supervisor has put in their environment, which other users can't read. Every value is
signed with it, together with its place in the conversation and the rank, so it can't be forged or replayed. Without a
supervisor (plain torchrun) there is no secret, and nothing is signed: SECURITY.md.
"""

from __future__ import annotations

import hashlib
import hmac
import os

GROUP_KEY_VARIABLE = "ZEROTOP_GROUP_KEY"
"""Secret key with which the ranks of an attempt sign what they send each other."""
_SIGNATURE_BYTES = 32


class SignatureError(RuntimeError):
    """A value was not signed by the rank that it is said to come from."""


def signed(content: bytes, place: str, rank: int) -> bytes:
    """`content` with its signature in front. place: what is sent and its number, the same on all ranks."""
    key = os.environ.get(GROUP_KEY_VARIABLE)
    return _signature(key, content, place, rank) + content if key else content


def checked(received: bytes, place: str, rank: int) -> bytes:
    """The content of what `signed` has returned. Raises SignatureError unless `rank` has signed it for `place`."""
    key = os.environ.get(GROUP_KEY_VARIABLE)
    if not key:
        return received
    signature, content = received[:_SIGNATURE_BYTES], received[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(key, content, place, rank)):
        raise SignatureError(
            f"a value received as rank {rank}'s has a wrong signature: another process has connected to a rank's port "
            "(SECURITY.md)"
        )
    return content


def _signature(key: str, content: bytes, place: str, rank: int) -> bytes:
    return hmac.digest(key.encode(), f"{place}/{rank}/".encode() + content, hashlib.sha256)
