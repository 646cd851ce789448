"""`ServeSettings`: where a system is served, to whom, and what a request may ask for. No torch here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from recmas.config.outline import Outline


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a system is served.

    Attributes:
        host: address to listen on; addresses other machines reach need api_keys, or open.
        port: 0 takes a free one.
        api_keys: file with a key per line, one of which every request under /v1 must carry.
        open: serve whoever reaches the address, without keys.
        window: milliseconds that a request waits for others to share its batches when it enters.
        batch_rows: most requests in a batch.
        batch_tokens: most positions in a batch, prompts and what is added to them; so many end the window, too.
        queue: requests that are answered or wait at once; further ones are turned away with 429.
        max_body: bytes of a request.
        max_prompt_tokens: positions of a prompt, with the messages that it reads and what the agent adds.
        max_tokens: that a request may ask for per text.
        max_rounds: that a request may ask for.
        max_latent_steps: that a request may ask for per message.
        timeout: seconds until a request is given up.
        drain: seconds that requests have to end after SIGTERM.

    Raises:
        ValueError: a value with which nothing can be served; one line that names the option.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str | None = None
    open: bool = False
    window: float = 5.0
    batch_rows: int = 64
    batch_tokens: int = 65536
    queue: int = 256
    max_body: int = 1 << 20
    max_prompt_tokens: int = 16384
    max_tokens: int = 4096
    max_rounds: int = 16
    max_latent_steps: int = 1024
    timeout: float = 300.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        least = {"batch_rows": 1, "batch_tokens": 1, "queue": 1, "max_body": 2, "max_prompt_tokens": 1, "max_rounds": 1}
        for name in (*least, "max_tokens", "max_latent_steps", "window", "timeout", "drain"):
            value = getattr(self, name)
            if not least.get(name, 0) <= value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')}: {value} is less than {least.get(name, 0)} or no number")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port: {self.port} is not between 0 and 65535")
        if not self.loopback and self.api_keys is None and not self.open:
            raise ValueError(f"--host: {self.host} can be reached from elsewhere; give --api-keys FILE, or --open")

    def check_system(self, outline: Outline) -> None:
        """Raise ValueError where requests that leave something out would get more than a request may ask for."""
        own = {
            "max_tokens": max(one.decoding.max_new_tokens for one in outline.settings.values()),
            "max_rounds": outline.defaults.rounds,
            "max_latent_steps": max(outline.steps_by_role(None).values()),
        }
        for name, count in own.items():
            bound, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if count > bound:
                raise ValueError(
                    f"{flag}: {bound} is less than {count}, the system's own; raise it or edit system.json"
                )

    @property
    def loopback(self) -> bool:
        """Whether this machine alone reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
