"""A second backend: the same networks as engines of NVIDIA's TensorRT 11.

Nothing here imports `tensorrt` by itself. api.py does when it is called; everything else is given the module as `trt`.
"""
