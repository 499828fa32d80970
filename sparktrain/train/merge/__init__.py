"""Merging models that were trained from one base: what the policies' names say, on models of any size."""

from sparktrain.train.merge.merging import Merge, merge

__all__ = ["Merge", "merge"]
