"""Data -> batches. A batch is a pure function of (seed, step); see order.py.

text.py reads shards of tokens (shards.py), pairs.py pictures with or without captions
(pair_files.py), latents.py encoded pictures, labelled.py the examples of a classifier, and chat.py
conversations.
"""
