"""What a family of models has of its own beside diffusers: the authors' own files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Layout(ABC):
    """What a family has of its own beside diffusers: weight files by other names, and what its models need once built."""

    own: tuple[str, ...] = ()
    """Settings that a configuration of the family may have, and diffusers' class has not; `prepare` carries them out."""

    @abstractmethod
    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` has the family's own names."""

    @abstractmethod
    def configuration(
        self, state: Mapping[str, Tensor], config: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The configuration of the model that `state` is of; only its names and shapes are looked at.

        `config` is what is known without the file, empty where nothing is; `given` has the user's own settings.
        """

    @abstractmethod
    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` by diffusers' names."""

    @abstractmethod
    def prepare(self, model: nn.Module, config: Mapping[str, Any], trained: bool) -> None:
        """Change a model in place before it is used: one with weights from a folder (`trained`), or a newly built one."""

    @abstractmethod
    def is_plain(self, config: Mapping[str, Any]) -> bool:
        """Whether diffusers' class of `config` is the very network, without `prepare`."""

    why_not_plain: str = ""
    """What users are told beside the file that is written where it is not."""

    @abstractmethod
    def original(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of `model` by the family's own names, on the CPU."""
