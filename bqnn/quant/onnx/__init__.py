"""A simulated network as a graph of ONNX operators."""
