"""The search for residual branches that end in a norm, in the graph of a forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .autograd_graph import AutogradGraph, is_leaf, kind

# The first operand of each is the input of the norm. The second is γ.
_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm", "NativeLayerNorm"}
_RESHAPES = {
    "Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView",
    "Unsqueeze", "View",
}  # fmt: skip
_DROPOUTS = {"FusedDropout", "NativeDropout"}
_SIGMOIDS = {"Sigmoid", "Hardsigmoid"}


@dataclass(frozen=True)
class LastNorm:
    """A norm that ends, or may end, a residual branch.

    Attributes:
        node: The node of the norm.
        gamma: The leaf of γ.
        scales: The leaves of the parameters that scale the output of the norm before the addition.
        problem: The reason to leave γ unchanged, or None if γ may be zero.
    """

    node: Node
    gamma: Node
    scales: list[Node]
    problem: str | None


def last_norms(graph: AutogradGraph) -> Iterator[LastNorm]:
    """Yields the last norms of the branches of each addition, if no operation after the norm can block a gradient.

    A sum of sums is one addition. Each pair of terms with a common ancestor is compared. The term with more layers is
    the branch. If both have equally many layers, the term that depends on the other term is the branch. Without such
    a dependence, the pair is undecided. A term that is the branch of no pair, and undecided in one, has a `problem`.
    A norm whose output is also used outside the addition has a `problem` as well.
    """
    for addition in graph.nodes:
        if not graph.is_addition(addition) or _is_inner(graph, addition):
            continue
        terms = _terms(graph, addition)
        for term in terms:
            others = [
                other for other in terms if other is not term and graph.have_common_ancestor(other, term)
            ]
            scales: list[Node] = []
            norm = _walk_back(graph, term, scales) if others else None
            gamma = _gamma(norm) if norm is not None else None
            if norm is None or gamma is None:
                continue
            relations = {_is_longer(graph, term, other) for other in others}
            if relations == {False}:
                continue
            problem = None
            if True not in relations:
                problem = "as many convolutions and linear layers lead to the other side of the addition"
            elif not graph.flows_only_into(norm, addition):
                problem = "its output is also used elsewhere"
            yield LastNorm(norm, gamma, scales, problem)


def _is_longer(graph: AutogradGraph, term: Node, other: Node) -> bool | None:
    """True if `term` is a branch and `other` is its shortcut, False if reversed, None if undecidable."""
    layers, other_layers = graph.layer_count(term), graph.layer_count(other)
    if layers != other_layers:
        return layers > other_layers
    if graph.depends_on(term, other):
        return True
    return False if graph.depends_on(other, term) else None


def _is_inner(graph: AutogradGraph, addition: Node) -> bool:
    """True if the only use of the sum is as a term of another sum."""
    consumers = graph.consumers[addition]
    return addition not in graph.roots and len(consumers) == 1 and graph.is_addition(consumers[0])


def _terms(graph: AutogradGraph, addition: Node) -> list[Node]:
    terms: dict[Node, None] = {}
    stack = graph.data_operands(addition)
    while stack:
        term = stack.pop()
        if graph.is_addition(term) and _is_inner(graph, term):
            stack.extend(graph.data_operands(term))
        else:
            terms[term] = None
    return list(terms)


def _walk_back(graph: AutogradGraph, node: Node, scales: list[Node]) -> Node | None:
    """Returns the norm at the end of the branch whose term is `node`, or None if another operation is in between.

    Appends the leaves of the scales on the way to `scales`.
    """
    while kind(node) not in _NORMS:
        data = graph.data_operands(node)
        if kind(node) == "Mul":
            factors = [factor for factor, _ in node.next_functions if factor is not None]
            scales.extend(
                leaf for factor in factors if not graph.is_data(factor) for leaf in graph.leaves(factor)
            )
            if len(factors) == 1 and _is_masked(node):
                return None
            if all(map(graph.is_data, factors)) and len(factors) == 2:
                data = [x for x, gate in (factors, factors[::-1]) if _is_gate(graph, gate, x)]
        elif kind(node) == "Div":
            if any(denominator is not None for denominator, _ in node.next_functions[1:]):
                return None
        elif kind(node) not in _RESHAPES | _DROPOUTS and not graph.is_addition(node):
            return None
        # An addition with one data operand adds a constant or a parameter.
        if len(data) != 1:
            return None
        node = data[0]
    return node


def _is_masked(product: Node) -> bool:
    """True if the factor without history has a bool for each element, as the mask of a handwritten ReLU has."""
    is_first = product.next_functions[0][0] is None
    constant = getattr(product, "_saved_self" if is_first else "_saved_other")
    if not isinstance(constant, Tensor) or constant.dtype != torch.bool:
        return False
    (output,) = product._input_metadata
    return [*constant.shape] == [*output.shape]


def _is_gate(graph: AutogradGraph, node: Node, gated: Node) -> bool:
    """True if `node` is a sigmoid of a layer's output.

    A sigmoid of `gated` itself, without a layer in between, is an activation, as in SiLU.
    """
    while kind(node) in _RESHAPES:
        [node] = graph.data_operands(node)
    return kind(node) in _SIGMOIDS and graph.adds_layers(node, to=gated)


def _gamma(norm: Node) -> Node | None:
    """Returns the leaf of γ, or None if the norm has no γ or computes γ from other tensors."""
    node = norm.next_functions[1][0]
    while node is not None and not is_leaf(node):
        if kind(node) not in _RESHAPES | {"Repeat"}:
            return None
        node = node.next_functions[0][0]
    return node
