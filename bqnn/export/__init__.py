"""Export: a quantized network leaves Python as an ONNX file that is verified against bqnn's int8.

`packages` asks for the optional packages, `model` writes the file of a model with what stands
before and after its network (`bqnn.quant.onnx` writes the network), `verification` compares the
file with int8, and `card` describes it.
"""
