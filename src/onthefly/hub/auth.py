"""Who may come in: the holder of the token, or of a cookie that was given for it.

A cookie holds a random session id and a proof that this hub gave it out, a MAC under the token. So no list of sessions has to be
kept, a page stays signed in when the hub is started again, and a new token signs everybody out. The token cannot be
found from a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

_LASTS = 30 * 24 * 3600  # seconds


class Keys:
    """The token of a hub, and what is made from it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self.hub = hashlib.sha256(b"onthefly hub " + self._token).hexdigest()[:8]
        """The hub's id. Two hubs of one browser have different ones: cookies do not know ports."""

    @property
    def cookie(self) -> str:
        """The name of the cookie."""
        return f"onthefly_{self.hub}"

    @property
    def lasts(self) -> int:
        """For how many seconds a cookie is good."""
        return _LASTS

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "surrogateescape"), self._token)

    def new_session(self) -> str:
        """The value of a new cookie: a random session id, until when it is good, and the proof."""
        said = f"{secrets.token_hex(16)}.{int(time.time()) + _LASTS}"
        return f"{said}.{self._proof(said)}"

    def is_session(self, value: str) -> bool:
        said, _, proof = value.rpartition(".")
        if not hmac.compare_digest(proof.encode("utf-8", "surrogateescape"), self._proof(said).encode()):
            return False
        return int(said.rpartition(".")[2]) > time.time()  # it is ours, so there is a number

    def _proof(self, said: str) -> str:
        message = b"session " + said.encode("utf-8", "surrogateescape")
        return hmac.new(self._token, message, hashlib.sha256).hexdigest()
