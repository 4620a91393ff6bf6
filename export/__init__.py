"""Ahead-of-time packages (.pt2): built with torch.export and AOTInductor, loaded instead of compiling."""
