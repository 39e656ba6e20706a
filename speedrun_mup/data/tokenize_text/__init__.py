"""Text of any kind to a corpus of shards: parallel, in constant memory, resumable, and always with the same bytes.

The work is done in a folder inside the one asked for, and what is whole moves out of it at the end, the manifest last. First
the text is read, and its tokens are written as sorted pieces (`external_sort`); then the pieces are merged into shards. From
time to time progress.json notes them with their hashes, after they were synced. A process that dies is started again with
the same command: it believes the note as far as the hashes and the text confirm it, and resumes from there. The order
and the part of a document depend on its text, its number and the seed alone, so the result is the same byte for byte.
"""

from speedrun_mup.data.tokenize_text.job import ORDERS, TextSettings
from speedrun_mup.data.tokenize_text.run import tokenize_text
from speedrun_mup.data.tokenize_text.split import FEWEST_VAL

__all__ = ["FEWEST_VAL", "ORDERS", "TextSettings", "tokenize_text"]
