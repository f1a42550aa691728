"""What build.py is made of: its flags, where weights come from, which quantization, what it takes, what it costs.

Writes nothing: the engines are in memory, their weights still in files.
"""
