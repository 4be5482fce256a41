"""The graph that autograd builds in a forward pass, read as a flow of data through layers."""

import re
from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node

_MATRIX_PRODUCTS = {"Addmm", "Mm", "Linear", "MkldnnLinear", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv"}
_EMBEDDINGS = {"Embedding", "EmbeddingBag"}


def kind(node: Node) -> str:
    """The operation, as `Relu` of `ReluBackward0`; empty for leaves and for autograd functions in Python."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return match[1] if match else ""


def is_layer(node: Node) -> bool:
    """Whether the node is a convolution or a matrix product, such as a linear layer's."""
    return "Conv" in kind(node) or kind(node) in _MATRIX_PRODUCTS


def operands(node: Node) -> list[Node]:
    """The nodes whose results `node` reads, each once; tensors without history have none."""
    return list(dict.fromkeys(operand for operand, _ in node.next_functions if operand is not None))


def is_leaf(node: Node) -> bool:
    """Whether the node stands for a tensor that gathers gradients."""
    return hasattr(node, "variable")


def leaf_tensor(leaf: Node) -> Tensor:
    tensor: Tensor = leaf.variable  # type: ignore[attr-defined]
    return tensor


class AutogradGraph:
    """The nodes that lead to what a model returned.

    *Data* is what depends on the model's input. It enters at the nodes `inputs`, at embeddings, and at layers
    that read nothing but tensors without history (an image prepared without gradients, say). What is not data
    is made from parameters alone.

    Args:
        roots: the nodes of what the model returned.
        inputs: the nodes of what it was given.
        additions: nodes that are additions though they are not called so.
    """

    def __init__(self, roots: Iterable[Node], inputs: Iterable[Node], additions: Iterable[Node]) -> None:
        self.roots = set(roots)
        self.nodes = _operands_first(self.roots)
        self.consumers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        # What a node depends on, itself included: a bit for each layer, and a bit for each entry of data.
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
        return self._entries[node] != 0

    def is_addition(self, node: Node) -> bool:
        return kind(node) == "Add" or node in self._additions

    def data_operands(self, node: Node) -> list[Node]:
        return [operand for operand in operands(node) if self.is_data(operand)]

    def have_common_ancestor(self, a: Node, b: Node) -> bool:
        """Whether some data flows into both."""
        return self._entries[a] & self._entries[b] != 0

    def layer_count(self, node: Node) -> int:
        """How many layers lead to `node`, itself included."""
        return self._layers[node].bit_count()

    def adds_layers(self, node: Node, to: Node) -> bool:
        """Whether a layer leads to `node` that does not lead to `to`."""
        return self._layers[node] & ~self._layers[to] != 0

    def depends_on(self, node: Node, ancestor: Node) -> bool:
        return ancestor in _operands_first([node])

    def flows_only_into(self, node: Node, target: Node) -> bool:
        """Whether everything that depends on `node`, the roots included, does so by way of `target`."""
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
        """The nodes that a backward pass reaches when the nodes `passing_none` pass no gradient on."""
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
        """The data nodes that read `parameter`, or something made from parameters of which it is one."""
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
        """The leaves that `node` is made from."""
        return [leaf for leaf in _operands_first([node]) if is_leaf(leaf)]


def _operands_first(roots: Iterable[Node]) -> list[Node]:
    """Every node that leads to `roots`, after all of its operands."""
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
