"""Random histories of a `World`: Hypothesis chooses a history, and shrinks a history that fails."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from .tensors import DTYPES, GRADIENTS, LAYOUTS, ROUTES, SHAPES, STORAGES
from .world import OWN_OPTIONS, World

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
    "ema_decay": st.sampled_from([None, 0.0, 0.3, 0.5, 0.99, 1.0]),
    "ema_warmup": st.booleans(),
}
COMPARED_WITH_TORCH = {name: option for name, option in OPTIONS.items() if name not in OWN_OPTIONS}
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


def groups_of(
    described: st.SearchStrategy[Any], options: dict[str, st.SearchStrategy[Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    """Returns a strategy for groups of up to three parameters, in one storage or more, with some of the options."""
    params = st.lists(described, min_size=1, max_size=3)
    return st.fixed_dictionaries({"params": params, "storage": st.sampled_from(STORAGES)}, optional=options)


ANY_GROUP = groups_of(DESCRIBED, OPTIONS)
GROUP_WITH_TORCH = groups_of(FULL, COMPARED_WITH_TORCH)
# True if torch.optim.SGD takes part until the end, the groups, and the options of all optimizers.
BEGINNINGS = st.one_of(
    st.tuples(st.just(False), st.lists(ANY_GROUP, min_size=1, max_size=2), SCALING),
    st.tuples(st.just(True), st.lists(GROUP_WITH_TORCH, min_size=1, max_size=2), st.just({})),
)


class Histories(RuleBasedStateMachine):
    """Random histories. Each event is recorded as a line of Python."""

    backends: tuple[str, ...] = ("cpu",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.world: World | None = None
        self.keeps_torch = False

    def script(self) -> str:
        """Returns a program that repeats the history; it runs in the folder `tests`."""
        return "\n".join(["from fuzz.world import World", *self.lines])

    def do(self, call: str, *args: Any) -> None:
        """Records a call of the world as a line, and makes the call."""
        self.lines.append(f"world.{call}({', '.join(map(repr, args))})")
        try:
            getattr(self.world, call)(*args)
        except Exception as error:
            error.add_note(f"This history repeats it:\n\n{self.script()}\n") if hasattr(
                error, "add_note"
            ) else print(self.script())
            raise

    @initialize(beginning=BEGINNINGS)
    def begin(self, beginning: tuple[bool, list[dict[str, Any]], dict[str, Any]]) -> None:
        self.keeps_torch, groups, options = beginning
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

    @rule(data=st.data())
    def add_group(self, data: Any) -> None:
        self.do("add_group", data.draw(GROUP_WITH_TORCH if self.keeps_torch else ANY_GROUP))

    @rule(data=st.data(), group=INDICES)
    def set_option(self, data: Any, group: int) -> None:
        options = COMPARED_WITH_TORCH if self.keeps_torch else OPTIONS
        name = data.draw(st.sampled_from(sorted(options)))
        self.do("set_option", group, name, data.draw(options[name]))

    @precondition(lambda self: not self.keeps_torch)
    @rule(max_grad_norm=st.sampled_from([None, 0.5, 1e9]))
    def clip(self, max_grad_norm: float | None) -> None:
        self.do("clip", max_grad_norm)

    @rule(index=INDICES, route=st.sampled_from(ROUTES), seed=SEEDS)
    def write(self, index: int, route: str, seed: int) -> None:
        self.do("write", index, route, seed)

    @precondition(lambda self: not self.keeps_torch)
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

    @rule(data=st.data())
    def follow_schedule(self, data: Any) -> None:
        self.do(
            "follow_schedule",
            data.draw(st.sampled_from(["calls"] if self.keeps_torch else ["calls", "applied"])),
        )

    @rule()
    def use_scaler(self) -> None:
        self.do("use_scaler")


def histories_of(*backends: str) -> type[Histories]:
    """Returns a state machine over some backends."""
    return type("Histories", (Histories,), {"backends": backends})
