"""Published layouts: weights, configs and tokenizers of other libraries, read and written.

layout.py is the start: it says what such a folder holds, and has the steps that all families share.
gpt.py and clip.py are for transformers; diffusion.py, scheduler.py and stable_diffusion.py are for
diffusers; tokenizers.py is for both. A lesson hands its classes in: its `from_pretrained` and
`save_pretrained` call the module of its family. So no module here imports a model.
"""
