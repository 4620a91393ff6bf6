"""Measuring recipes: one fresh process each, result files, and the tables and charts made from them."""
