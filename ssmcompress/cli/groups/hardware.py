"""Options of the hardware."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from ... import processes
from ...errors import InputError
from ..devices import AUTO, choose_device, explain_device
from ..options import HARDWARE, option
from ..terminal import is_quiet, say


@dataclass(frozen=True)
class Processor:
    """The CPU."""

    threads: Annotated[
        int | None, option(HARDWARE, min=1, max=1024, help="Number of CPU threads. Default: all cores.")
    ] = None

    def start(self) -> Any:
        """Set the number of threads and return the device."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return torch.device("cpu")


@dataclass(frozen=True)
class Hardware(Processor):
    """Where to compute."""

    device: Annotated[
        str, option(HARDWARE, help="cpu, cuda, cuda:1, mps or xpu; auto: cuda if it works, else cpu.")
    ] = AUTO

    @cached_property
    def resolved(self) -> str:
        """The name of the device; if `auto` chose it, a message has said so."""
        name, why = choose_device(self.device)
        if why:
            say(why, is_quiet())
        return name

    def start(self) -> Any:
        """Set the number of CPU threads and return the device of this process.

        Raises:
            InputError: the device is not available.
        """
        import torch

        super().start()
        try:
            device = torch.device(processes.start(self.resolved))
            torch.zeros(1, device=device).item()  # fails for the meta device, which has no values
        except Exception as error:
            raise InputError(f"--device {self.device}: {explain_device(self.resolved, error)}") from error
        # By default, torch computes float32 convolutions, including the patch embedding, with 10 bits (TF32).
        torch.backends.cudnn.allow_tf32 = False
        logging.getLogger("ssmcompress").debug("device %s, %d threads", device, torch.get_num_threads())
        return device


NoLatency = Annotated[bool, option(HARDWARE, "--no-latency", help="Do not time the models.")]
