"""The parameters of one wrapped optimizer that take part, and the buckets that they lie in. Local."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.memory.layout import ChooseCompressor, Layout, averages_gradients, build_layout, takes_part
from hvd_saef.round.determinism import check_compressors
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Communicator


class Parameters:
    """Owns the layout: it grows here and nowhere else."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: dict[Tensor, str],
        choose: ChooseCompressor,
        settings: Settings,
        layout: Layout,
    ) -> None:
        """`names` and `choose` give each parameter's name and compressor; `layout` is the first layout."""
        self._inner = inner
        self._names = names
        self._choose = choose
        self._settings = settings
        self._layout = layout

    @property
    def layout(self) -> Layout:
        """The buckets of all parameters."""
        return self._layout

    @property
    def with_state(self) -> Layout:
        """The buckets that have x and errors: none where gradients are averaged."""
        return Layout((), {}) if self.averages_gradients else self._layout

    @property
    def averages_gradients(self) -> bool:
        """Whether to do Horovod's arithmetic: nothing is compressed and nothing is fed back."""
        return averages_gradients(self._settings, self._layout)

    @property
    def joining(self) -> bool:
        """Whether a parameter that was frozen takes part now, and is not laid out yet."""
        return any(takes_part(parameter) for _, parameter, _ in self._layout.frozen)

    def check_complete(self) -> None:
        """Raise RuntimeError if the optimizer's groups hold other parameters than those that are known."""
        held = sum(len(group["params"]) for group in self._inner.param_groups)
        if held != len(self._layout.slots) + len(self._layout.frozen):
            raise RuntimeError(
                "the wrapped optimizer's parameters changed behind the wrapper: call add_param_group of what "
                "hvd_saef.DistributedOptimizer returned."
            )

    def grow(self, began: bool, communicator: Communicator) -> None:
        """Lay out the parameters that were added or unfrozen; after the others, once training `began`.

        Raises ValueError for a parameter that cannot be laid out, with the layout as before.
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
