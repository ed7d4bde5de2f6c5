"""The page of a checkpoint: one HTML file for a browser, without a network, that shows what was decided and what it costs.

`source` reads what a checkpoint knows, `facts` turns it into numbers and words, `layout` places the boxes of a block, and the templates
show all of it. Whatever a checkpoint says is data: names and remarks are escaped wherever they stand.
"""

from qpc.page.render import render, write
from qpc.page.source import Source

__all__ = ["Source", "render", "write"]
