"""Part maps: learned from images without labels, written beside them, and judged (`fastssl parts`).

They are what SemMAE's masks follow. The paper (Li et al. 2022, arXiv 2206.10207) describes the learning, its authors
have not published the code; where the description leaves something open, the choice is marked as ours.
"""
