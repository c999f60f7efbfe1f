"""The sources of data: one runnable file each, and no model code. README.md has the list.

reading.py opens files of strangers, and tables.py reads their tables. report.py counts what a
source found and used. download.py fetches a file once. The modules dedupe, filters and jobs belong
to prepare.py, which prepares a large corpus.
"""
