"""What a tree has dealt out, for numbers too large to count."""

from data_pipelines.sampling import SplitTree


def had_by(tree: SplitTree, k: int) -> list[int]:
    """How often each leaf was drawn in the first k numbers: the index of its next draw."""
    had = {}
    while len(had) < tree.leaves:
        located = tree.locate(k)
        had.setdefault(located.leaf, located.index)
        k += 1
    return [had[leaf] for leaf in range(tree.leaves)]
