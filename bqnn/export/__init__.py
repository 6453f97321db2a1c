"""Export: a quantized network leaves Python as an ONNX file that is verified against bqnn's int8.

`packages` asks for the optional packages, `graph` builds a file, `network` walks a network and
writes its layers in the form of `exact` or `qdq`, `model` adds what stands before and after it,
`verification` compares the file with int8, and `card` describes it.
"""
