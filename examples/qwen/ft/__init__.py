"""The FT folder, by which SmoothQuant's weights come from hf_qwen_convert.py to build.py: layout, writing, reading.

Knows nothing of the text that was read for it.
"""
