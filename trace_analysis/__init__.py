"""Reads the Chrome traces that torch.profiler writes: `python -m trace_analysis report trace.json.gz`."""
