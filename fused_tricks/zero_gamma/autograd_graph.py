"""The autograd graph of a forward pass, read as the flow of data through layers."""

import re
from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node

_MATRIX_PRODUCTS = {"Addmm", "Mm", "Linear", "MkldnnLinear", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv"}
_EMBEDDINGS = {"Embedding", "EmbeddingBag"}


def kind(node: Node) -> str:
    """Returns the operation, as `Relu` for `ReluBackward0`; empty for leaves and for autograd functions in Python."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return match[1] if match else ""


def is_layer(node: Node) -> bool:
    """True if the node is a convolution or a matrix product, such as that of a linear layer."""
    return "Conv" in kind(node) or kind(node) in _MATRIX_PRODUCTS


def operands(node: Node) -> list[Node]:
    """Returns the nodes whose results `node` reads, each once. A tensor without history has no node."""
    return list(dict.fromkeys(operand for operand, _ in node.next_functions if operand is not None))


def is_leaf(node: Node) -> bool:
    """True if the node represents a tensor that accumulates gradients."""
    return hasattr(node, "variable")


def leaf_tensor(leaf: Node) -> Tensor:
    """Returns the tensor that a leaf represents."""
    tensor: Tensor = leaf.variable  # type: ignore[attr-defined]
    return tensor


class AutogradGraph:
    """The nodes that lead to the output of a model.

    *Data* is any result that depends on the input of the model. Data enters at the nodes `inputs`, at embeddings, and
    at layers whose input has no history, such as an image prepared without gradients. All other results depend on
    parameters and constants alone. Below, a node leads to itself.

    Args:
        roots: The nodes of the model's output.
        inputs: The nodes of the model's input.
        additions: The additions whose nodes have another name.
    """

    def __init__(self, roots: Iterable[Node], inputs: Iterable[Node], additions: Iterable[Node]) -> None:
        self.roots = set(roots)
        self.nodes = _operands_first(self.roots)
        self.consumers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        # The layers, and the entries of data, that lead to each node: one bit for each.
        self._layers: dict[Node, int] = {}
        self._entries: dict[Node, int] = {}
        self._additions = set(additions)
        inputs = set(inputs)
        for number, node in enumerate(self.nodes):
            layers = entries = 0
            for operand in operands(node):
                self.consumers[operand].append(node)
                layers |= self._layers[operand]
                entries |= self._entries[operand]
            reads_detached = is_layer(node) and any(operand is None for operand, _ in node.next_functions)
            if node in inputs or kind(node) in _EMBEDDINGS or (reads_detached and not entries):
                entries |= 1 << number
            if is_layer(node) and entries:
                layers |= 1 << number
            self._layers[node], self._entries[node] = layers, entries

    def is_data(self, node: Node) -> bool:
        """True if the result of `node` depends on the input of the model."""
        return self._entries[node] != 0

    def is_addition(self, node: Node) -> bool:
        """True if `node` is an addition, by its name or as one of `additions`."""
        return kind(node) == "Add" or node in self._additions

    def data_operands(self, node: Node) -> list[Node]:
        """Returns the operands of `node` that are data."""
        return [operand for operand in operands(node) if self.is_data(operand)]

    def have_common_ancestor(self, a: Node, b: Node) -> bool:
        """True if one entry of data leads to both nodes."""
        return self._entries[a] & self._entries[b] != 0

    def layer_count(self, node: Node) -> int:
        """Returns the number of layers that lead to `node`. A layer without data does not count."""
        return self._layers[node].bit_count()

    def adds_layers(self, node: Node, to: Node) -> bool:
        """True if at least one layer leads to `node` but not to `to`."""
        return self._layers[node] & ~self._layers[to] != 0

    def depends_on(self, node: Node, ancestor: Node) -> bool:
        """True if `ancestor` leads to `node`."""
        return ancestor in _operands_first([node])

    def flows_only_into(self, node: Node, target: Node) -> bool:
        """True if every path from `node` to a root goes through `target`."""
        seen = {target}
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in seen:
                if current in self.roots:
                    return False
                seen.add(current)
                stack.extend(self.consumers[current])
        return True

    def nodes_with_gradients(self, passing_none: Collection[Node]) -> set[Node]:
        """Returns the nodes that a backward pass reaches if the nodes `passing_none` pass no gradient on."""
        found: set[Node] = set()
        stack = list(self.roots)
        while stack:
            current = stack.pop()
            if current not in found:
                found.add(current)
                if current not in passing_none:
                    stack.extend(operands(current))
        return found

    def uses(self, parameter: Node) -> set[Node]:
        """Returns the data nodes that read `parameter`, directly or through nodes without data."""
        found = set()
        stack = [parameter]
        while stack:
            current = stack.pop()
            if self.is_data(current):
                found.add(current)
            else:
                stack.extend(self.consumers[current])
        return found

    def leaves(self, node: Node) -> list[Node]:
        """Returns the leaves that lead to `node`."""
        return [leaf for leaf in _operands_first([node]) if is_leaf(leaf)]


def _operands_first(roots: Iterable[Node]) -> list[Node]:
    """Returns all nodes that lead to `roots`, each after its operands."""
    order: dict[Node, None] = {}
    opened = set()
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node not in opened:
            opened.add(node)
            stack.extend(operand for operand in operands(node) if operand not in opened)
        else:
            order[stack.pop()] = None
    return list(order)
