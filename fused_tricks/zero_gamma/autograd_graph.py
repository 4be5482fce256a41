"""The autograd graph of a forward pass, read as a flow of data through layers."""

import re
from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node

_MATRIX_PRODUCTS = {"Addmm", "Mm", "Linear", "MkldnnLinear", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv"}
_EMBEDDINGS = {"Embedding", "EmbeddingBag"}


def kind(node: Node) -> str:
    """Returns the name of the operation, such as `Relu`; empty for leaves and for autograd functions in Python."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return match[1] if match else ""


def is_layer(node: Node) -> bool:
    """True if the node is a convolution or a matrix product; linear layers are matrix products."""
    return "Conv" in kind(node) or kind(node) in _MATRIX_PRODUCTS


def operands(node: Node) -> list[Node]:
    """Returns the nodes whose results `node` reads, each once; a tensor without history has no node."""
    return list(dict.fromkeys(operand for operand, _ in node.next_functions if operand is not None))


def is_leaf(node: Node) -> bool:
    """True if the node represents a tensor that accumulates gradients."""
    return hasattr(node, "variable")


def leaf_tensor(leaf: Node) -> Tensor:
    """Returns the tensor of a leaf."""
    tensor: Tensor = leaf.variable  # type: ignore[attr-defined]
    return tensor


class AutogradGraph:
    """The nodes that lead to a model's outputs.

    *Data* depends on the model's inputs. Data enters at the nodes `inputs`, at embeddings, and at layers whose only
    data is a tensor without history, such as an image prepared without gradients. All other nodes depend on parameters
    only.

    Args:
        roots: The nodes of the model's outputs.
        inputs: The nodes of the model's inputs.
        additions: Nodes that are additions under another name.
    """

    def __init__(self, roots: Iterable[Node], inputs: Iterable[Node], additions: Iterable[Node]) -> None:
        self.roots = set(roots)
        self.nodes = _operands_first(self.roots)
        self.consumers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        # The layers and the entries of data that a node depends on, the node itself included: one bit for each.
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
        """True if the node depends on the model's inputs."""
        return self._entries[node] != 0

    def is_addition(self, node: Node) -> bool:
        """True if the node adds tensors."""
        return kind(node) == "Add" or node in self._additions

    def data_operands(self, node: Node) -> list[Node]:
        """Returns the operands of the node that are data."""
        return [operand for operand in operands(node) if self.is_data(operand)]

    def have_common_ancestor(self, a: Node, b: Node) -> bool:
        """True if the same data flows into both nodes."""
        return self._entries[a] & self._entries[b] != 0

    def layer_count(self, node: Node) -> int:
        """Returns the number of layers that lead to `node`, itself included."""
        return self._layers[node].bit_count()

    def adds_layers(self, node: Node, to: Node) -> bool:
        """True if a layer leads to `node` and not to `to`."""
        return self._layers[node] & ~self._layers[to] != 0

    def depends_on(self, node: Node, ancestor: Node) -> bool:
        """True if `ancestor` leads to `node`, or is `node`."""
        return ancestor in _operands_first([node])

    def flows_only_into(self, node: Node, target: Node) -> bool:
        """True if every path from `node` to a root passes through `target`."""
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
        """Returns the nodes that a backward pass reaches if the nodes in `passing_none` pass no gradient on."""
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
        """Returns the data nodes that read `parameter`, or a tensor computed from parameters that include it."""
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
        """Returns the leaves that `node` is computed from."""
        return [leaf for leaf in _operands_first([node]) if is_leaf(leaf)]


def _operands_first(roots: Iterable[Node]) -> list[Node]:
    """Returns the roots and every node that leads to them, each after all of its operands."""
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
