"""What checkpoints hold and how it is read, tensor by tensor: Hugging Face's shards and four quantized formats.

weight_map.py names the tensors of a Qwen. Knows no engine and hands nothing to a model: weight.py does.
"""
