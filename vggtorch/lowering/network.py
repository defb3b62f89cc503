"""The torch network of a Keras model, which keeps in step with it and runs the fast way."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vggtorch.lowering.plan import Plan
from vggtorch.lowering.settings import Settings
from vggtorch.lowering.ties import Ties

KEPT_OUT = "_written", "_plan", "_ties", "_settings", "_compiled_call_impl"  # of pickles


class TorchNetwork(torch.fx.GraphModule):
    """What `to_torch` returns: a torch.fx.GraphModule that keeps in step with its Keras model.

    Deep copies and pickles of it stand alone, with memory of their own.
    """

    _ties = Ties()
    _settings = Settings()  # of the Keras layers that it follows
    _plan = None  # without a type, which torch.jit.script would want to know

    if TYPE_CHECKING:  # the children are known only when the network is built
        _written: torch.fx.Graph  # the graph as the code of `forward` has it

        def __getattr__(self, name: str) -> Any: ...

    def _sync(self) -> bool:
        """Carry over what was replaced on either side; not under a tracer, which must not see it.

        Returns:
            Whether it was done.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        self._ties.sync()
        self._settings.warn_of_changes()
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, once what was replaced on either side has been carried over.

        The fast plan runs it where nobody can tell; else torch runs it as any other module.
        """
        if self._sync() and self._compiled_call_impl is None:
            plan = self._current_plan()
            inputs = args if plan is None else plan.in_order(args, kwargs)
            if plan is not None and plan.takes(inputs):
                try:
                    return plan(inputs)
                except RuntimeError as error:
                    if not hasattr(error, "__notes__"):  # of a network that is nested in this one
                        for note in plan.notes_of(inputs):
                            error.add_note(note)
                    raise
        return super().__call__(*args, **kwargs)

    def is_watched(self) -> bool:
        """Whether its modules must run one by one: hooks, modes, transforms, other forwards."""
        plan = self._current_plan()
        return plan is None or plan.is_watched() or self._compiled_call_impl is not None

    def train(self, mode: bool = True) -> TorchNetwork:
        """As torch.nn.Module has it; evaluation lets go of memory that training has kept."""
        if not mode and self._plan is not None:
            self._plan.release()
        super().train(mode)
        return self

    def recompile(self) -> Any:
        """As torch.fx.GraphModule has it: make `forward` anew from the graph as it is now."""
        code = super().recompile()
        self._written, self._plan = copy.deepcopy(self.graph), None
        return code

    def _current_plan(self) -> Plan | None:
        """The plan for the code and the modules as they are now; None where there is none."""
        if self._plan is None or not self._plan.is_current():
            try:
                checkpoint, winograd = map(self.meta.get, ("checkpoint", "winograd"))
                self._plan = Plan(
                    self._written, self, checkpoint=bool(checkpoint), winograd=bool(winograd)
                )
            except (KeyError, NotImplementedError):  # a child is gone, or the graph is edited
                return None
        return self._plan

    # A GraphModule's own copies drop hooks, and what the graph doesn't use; a module's keep all.

    def __copy__(self) -> TorchNetwork:
        state = self.__getstate__()
        own = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in state.items()}
        return self._with(own)

    def __deepcopy__(self, memo: Any) -> TorchNetwork:
        return self._with(copy.deepcopy(self.__getstate__(), memo))

    def _with(self, state: dict[str, Any]) -> TorchNetwork:
        """A network of these attributes, with code of its own."""
        made = type(self).__new__(type(self))
        type(made).__name__ = type(self).__name__
        vars(made).update(state)
        made.graph = made.graph  # makes `forward`
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """As torch.fx.GraphModule has it: the code is pickled, and the graph traced from it."""
        make, (state, *rest) = super().__reduce__()
        state = {k: v for k, v in state.items() if k not in KEPT_OUT}
        state["_graphmodule_cls_name"] = type(self).__name__
        ranks = [n.meta.get("rank") for n in self._written.nodes if n.op == "placeholder"]
        return _unpickled, (make, (state, *rest), ranks)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch.nn.Module has it, with requires_grad as Keras's `trainable` flags are now.

        Every list of parameters, that of a module around this one too, begins with it.
        """
        self._sync()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch.nn.Module has it, with what Keras has replaced."""
        self._sync()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchNetwork:
        """What `.to()`, `.cuda()` and `.half()` do: the Keras variables follow where they can."""
        super()._apply(fn, recurse)
        self._ties.find()
        return self


def _unpickled(
    make: Callable[..., torch.fx.GraphModule],
    arguments: tuple[dict[str, Any], Any],
    ranks: list[int | None],
) -> TorchNetwork:
    """The network of a pickle, which holds its code and its modules."""
    plain = make(*arguments)
    for node, rank in zip(plain.graph.nodes, ranks, strict=False):  # the first are the inputs
        node.meta["rank"] = rank
    network = TorchNetwork(plain, plain.graph, class_name=type(plain).__name__)
    of_code = ("_code", "_lineno_map", "_prologue_start", "_graphmodule_cls_name")
    vars(network).update({k: v for k, v in arguments[0].items() if k not in of_code})
    return network


@cache
def names_in_use() -> set[str]:
    """What the code of `forward` calls its network, and what each network has of its own."""
    graph = torch.fx.Graph()
    graph.output(None)
    return {"self", *vars(TorchNetwork(nn.Module(), graph))}


def identifier(name: str, taken: Sequence[str] = ()) -> str:
    """A name that Python takes for an argument or a class, and that the code doesn't use."""
    name = "".join(c if c.isalnum() else "_" for c in name)
    if not name.isidentifier() or keyword.iskeyword(name) or name in ("self", "torch"):
        name = f"_{name}"
    while name in taken:
        name += "_"
    return name
