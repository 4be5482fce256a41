from typing import Any

ScaleRule = tuple[float, float, float, float, int, int]

class Plan:
    def __init__(
        self, entries: list[tuple[Any, ...]], step_state: Any, reads_lr: bool, compared: int
    ) -> None: ...
    def watch_state(self, state: dict[Any, Any]) -> None: ...
    def cpu_step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        unscales: bool,
        grad_scale: float | None,
        found_inf: bool,
        max_norm: float | None,
        scale_rule: ScaleRule | None,
    ) -> int: ...

class CudaStep:
    def __init__(self, plan: Plan) -> None: ...
    def table_size(self) -> int: ...
    def set_tables(self, plan: Plan, memory: Any) -> None: ...
    def scratch_size(self) -> int: ...
    def set_scratch(self, memory: Any) -> None: ...
    def run(
        self,
        plan: Plan,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        unscales: bool,
        grad_scale: Any,
        found_inf: Any,
        max_norm: float | None,
        scale_rule: ScaleRule | None,
    ) -> int: ...

__version__: str
CPU_COMPARED: int

def connect(
    tensor_type: type,
    parameter_type: type,
    increment_version: object,
    functions: dict[str, int],
    samples: list[Any],
) -> None: ...
def instruction_sets() -> list[str]: ...
def selected_instruction_set() -> str: ...
def select_instruction_set(name: str) -> None: ...
