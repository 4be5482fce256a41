"""Hypothesis chooses what happens to a `World`, and shrinks a history that fails."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from .tensors import DTYPES, GRADIENTS, LAYOUTS, ROUTES, SHAPES, STORAGES
from .world import World

SEEDS = st.integers(0, 999)
INDICES = st.integers(0, 5)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-3, 0.1, 1.5]),
    "momentum": st.sampled_from([0, 0.5, 0.9]),
    "dampening": st.sampled_from([0, 0.25]),
    "weight_decay": st.sampled_from([0, 1e-4, 0.1]),
    "maximize": st.booleans(),
    "bias_decay": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "ema_decay": st.sampled_from([None, 0.3, 0.99]),
    "ema_warmup": st.booleans(),
}
DESCRIBED = st.tuples(
    st.sampled_from(sorted(DTYPES)), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), SEEDS
)
FULL = st.tuples(st.sampled_from(["f32", "f64"]), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), SEEDS)
SCALING = st.sampled_from(
    [
        {},
        {},
        {"loss_scale": 8.0},
        {"loss_scale": {"init_scale": 64.0, "growth_interval": 2}},
        {"loss_scale": {"init_scale": 64.0, "growth_interval": 1, "hysteresis": 2, "max_scale": 256.0}},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.25, "loss_scale": 2.0},
    ]
)


def groups_of(described: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Groups of up to three parameters, in one storage or more, with some options."""
    params = st.lists(described, min_size=1, max_size=3)
    return st.fixed_dictionaries({"params": params, "storage": st.sampled_from(STORAGES)}, optional=OPTIONS)


GROUPS = st.lists(groups_of(DESCRIBED), min_size=1, max_size=2) | st.lists(
    groups_of(FULL), min_size=1, max_size=2
)


class Histories(RuleBasedStateMachine):
    """Random histories. Each thing that happens is noted as a line of Python."""

    backends: tuple[str, ...] = ("cpu",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.world: World | None = None

    def script(self) -> str:
        """Returns a program that repeats the history; it runs in the folder `tests`."""
        return "\n".join(["from fuzz.world import World", *self.lines])

    def do(self, call: str, *args: Any) -> None:
        """Notes a call of the world, and makes it."""
        self.lines.append(f"world.{call}({', '.join(map(repr, args))})")
        try:
            getattr(self.world, call)(*args)
        except Exception as error:
            error.add_note(f"This history repeats it:\n\n{self.script()}\n") if hasattr(
                error, "add_note"
            ) else print(self.script())
            raise

    @initialize(groups=GROUPS, options=SCALING)
    def begin(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> None:
        self.lines.append(f"world = World({self.backends!r}, {groups!r}, **{options!r})")
        self.world = World(self.backends, groups, **options)

    @rule(kinds=st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=4), seed=SEEDS)
    def step(self, kinds: list[str], seed: int) -> None:
        self.do("step", kinds, seed)

    @rule(seed=SEEDS)
    def steady_steps(self, seed: int) -> None:
        for number in range(2):
            self.do("step", ["dense"], seed + number)

    @rule(seed=SEEDS)
    def refused_step(self, seed: int) -> None:
        self.do("refused_step", seed)

    @rule(group=groups_of(DESCRIBED))
    def add_group(self, group: dict[str, Any]) -> None:
        self.do("add_group", group)

    @rule(data=st.data(), group=INDICES, name=st.sampled_from(sorted(OPTIONS)))
    def set_option(self, data: Any, group: int, name: str) -> None:
        self.do("set_option", group, name, data.draw(OPTIONS[name]))

    @rule(max_grad_norm=st.sampled_from([None, 0.5, 1e9]))
    def clip(self, max_grad_norm: float | None) -> None:
        self.do("clip", max_grad_norm)

    @rule(index=INDICES, route=st.sampled_from(ROUTES), seed=SEEDS)
    def write(self, index: int, route: str, seed: int) -> None:
        self.do("write", index, route, seed)

    @rule(index=INDICES, dtype=st.sampled_from(sorted(DTYPES)))
    def change_dtype(self, index: int, dtype: str) -> None:
        self.do("change_dtype", index, dtype)

    @rule(index=INDICES, layout=st.sampled_from(LAYOUTS))
    def change_layout(self, index: int, layout: str) -> None:
        self.do("change_layout", index, layout)

    @rule(index=INDICES)
    def freeze(self, index: int) -> None:
        self.do("freeze", index)

    @rule(route=st.sampled_from(["state_dict", "copy", "pickle"]))
    def reload(self, route: str) -> None:
        self.do("reload", route)

    @rule(count=st.sampled_from(["calls", "applied"]))
    def follow_schedule(self, count: str) -> None:
        self.do("follow_schedule", count)

    @rule()
    def use_scaler(self) -> None:
        self.do("use_scaler")


def histories_of(*backends: str) -> type[Histories]:
    """A state machine over some backends."""
    return type("Histories", (Histories,), {"backends": backends})
