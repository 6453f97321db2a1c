"""A graph of ONNX operators, in which equal operations and equal constants stand once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPSET = 17
IR_VERSION = 8  # of the first release of ONNX with this opset
LARGEST_FILE = 2**31 - 2**26  # bytes of constants; protobuf allows 2 GiB for the whole file


@dataclass(frozen=True)
class Call:
    """The call of an operator with one output.

    Attributes:
        operator: The name of the operator.
        inputs: The names of its inputs.
        output: The name of its output.
        attributes: The attributes by name.
    """

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        dtype: The type of its elements.
        shape: Its shape. A string names a size that is free.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]


class Graph:
    """Calls of operators in their order, and constants.

    A call with the operator, inputs and attributes of an earlier one returns the output of that
    one. What several draws of a network have in common therefore stands once.

    Examples:
        >>> graph = Graph()
        >>> one = graph.constant(np.float32(1))
        >>> graph.call("Add", "x", one) == graph.call("Add", "x", graph.constant(np.float32(1)))
        True
        >>> len(graph.calls)
        1
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.constants: dict[str, np.ndarray] = {}
        self.num_bytes = 0  # of all constants
        self._outputs: dict[Any, str] = {}
        self._names: dict[Any, str] = {}

    def constant(self, values: Any) -> str:
        """Return the name of a constant with these values, a NumPy array or number.

        Raises:
            ValueError: The constants together are too large for a file.
        """
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._names:
            self._names[key] = f"constant_{len(self._names)}"
            self.constants[self._names[key]] = array
            self.num_bytes += array.nbytes
            if self.num_bytes > LARGEST_FILE:
                raise ValueError(
                    "the file would have 2 GiB, and ONNX allows less; use a smaller num_samples"
                )
        return self._names[key]

    def call(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Return the name of the output of an operator.

        Args:
            operator: The name of the operator, with its domain in front if it has one.
            inputs: The names of its inputs; "" for one that is left out.
            attributes: Numbers, texts and tuples of them.
        """
        key = (operator, inputs, tuple(sorted(attributes.items())))
        if key not in self._outputs:
            output = f"{operator.rpartition('.')[2].lower()}_{len(self.calls)}"
            self.calls.append(Call(operator, inputs, output, key[2]))
            self._outputs[key] = output
        return self._outputs[key]

    def cast(self, x: str, dtype: Any) -> str:
        """Return `x` with elements of a type of NumPy."""
        return self.call("Cast", x, to=TYPES[np.dtype(dtype).name])

    def to_onnx(
        self,
        inputs: Sequence[Port],
        outputs: Mapping[str, Port],
        metadata: Mapping[str, str],
        *,
        check: bool = True,
    ) -> Any:
        """Make the model of ONNX.

        Args:
            inputs: The inputs.
            outputs: The outputs, each under the name of the value that it has in the graph.
            metadata: Texts by name.
            check: Whether to check the model against the standard.

        Raises:
            ValueError: The model violates the standard.
        """
        import onnx

        nodes = [
            onnx.helper.make_node(
                c.operator.rpartition(".")[2],
                c.inputs,
                [c.output],
                c.output,
                domain=c.operator.rpartition(".")[0],
                **dict(c.attributes),
            )
            for c in self.calls
        ]
        nodes += [
            onnx.helper.make_node("Identity", [value], [port.name])
            for value, port in outputs.items()
        ]
        graph = onnx.helper.make_graph(
            nodes,
            "bqnn",
            [value_info(port) for port in inputs],
            [value_info(port) for port in outputs.values()],
            [onnx.numpy_helper.from_array(a, name) for name, a in self.constants.items()],
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid(*each) for each in self._opsets()],
            producer_name="bqnn",
            ir_version=IR_VERSION,
        )
        onnx.helper.set_model_props(model, dict(metadata))
        if not check:
            return model
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"the file violates the ONNX standard: {reason}") from error
        return model

    def _opsets(self) -> list[tuple[str, int]]:
        domains = {call.operator.rpartition(".")[0] for call in self.calls}
        return [("", OPSET), *((domain, 1) for domain in sorted(domains - {""}))]


# The numbers of ONNX's types of elements (TensorProto.DataType).
TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float64": 11,
}


def value_info(port: Port) -> Any:
    """Return an input or output as onnx.ValueInfoProto."""
    import onnx

    return onnx.helper.make_tensor_value_info(port.name, TYPES[port.dtype.name], port.shape)
