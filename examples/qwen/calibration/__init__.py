"""How quantize.py makes GPTQ and AWQ weights: read text layer by layer, quantize, pack, write a checkpoint's folder.

Knows neither flags nor where the text comes from.
"""
