"""The parameters of one wrapped optimizer that take part, and the buckets that hold them. Local."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.memory.layout import ChooseCompressor, Layout, averages_gradients, build_layout, takes_part
from hvd_saef.round.determinism import check_compressors
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Communicator


class Parameters:
    """Owns the layout. Only this class changes the layout."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: dict[Tensor, str],
        choose: ChooseCompressor,
        settings: Settings,
        layout: Layout,
    ) -> None:
        """Keep `names` and `choose`, for a parameter's name and compressor, and `layout`, the first one."""
        self._inner = inner
        self._names = names
        self._choose = choose
        self._settings = settings
        self._layout = layout

    @property
    def layout(self) -> Layout:
        """The layout with the buckets of all parameters."""
        return self._layout

    @property
    def with_state(self) -> Layout:
        """The part of the layout that has x and errors: no bucket, if gradients are averaged."""
        return Layout((), {}) if self.averages_gradients else self._layout

    @property
    def averages_gradients(self) -> bool:
        """True if gradients are averaged as by Horovod: nothing is compressed and nothing is fed back."""
        return averages_gradients(self._settings, self._layout)

    @property
    def joining(self) -> bool:
        """True if a parameter that was frozen takes part now, but is not in a bucket yet."""
        return any(takes_part(parameter) for _, parameter, _ in self._layout.frozen)

    def check_complete(self) -> None:
        """Raises RuntimeError if the optimizer's groups hold more or fewer parameters than the layout."""
        held = sum(len(group["params"]) for group in self._inner.param_groups)
        if held != len(self._layout.slots) + len(self._layout.frozen):
            raise RuntimeError(
                "the wrapped optimizer's parameters changed behind the wrapper: call add_param_group of what "
                "hvd_saef.DistributedOptimizer returned."
            )

    def grow(self, began: bool, communicator: Communicator) -> None:
        """Lays out the parameters that were added or unfrozen; after the old buckets, once training `began`.

        Raises ValueError for a parameter that cannot be laid out; the layout is then unchanged.
        """
        for i, group in enumerate(self._inner.param_groups):
            for j, parameter in enumerate(group["params"]):
                self._names.setdefault(parameter, f"noname.{i}.{j}")
        layout = build_layout(
            self._inner.param_groups,
            self._names,
            self._choose,
            self._settings,
            earlier=self._layout if began else None,
        )
        if self.averages_gradients and not layout.dense:
            raise ValueError(
                "a compressed parameter was added to an optimizer that averages dense gradients."
            )
        check_compressors(layout, self._settings, communicator)
        self._layout = layout
