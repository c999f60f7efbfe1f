"""Classifiers of tinyfm for transformers: a body that it knows, and one linear layer.

This file is copied into the folder of an exported classifier, where transformers reads it if it is
called with trust_remote_code=True. It imports torch and transformers only. tinyfm/adapt/heads.py
explains what is computed:

    features  text: the mean state over the tokens. picture: the class token's state, and the means
              of the patches' states over a coarse grid
    x         the features, normalised to mean 0 and standard deviation 256 / (number of features)
    logits    W x + b
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput

WIDTH = 256  # with this many features, they have a standard deviation of 1


class TinyfmClassifierConfig(PretrainedConfig):
    """body: the config of the body. features: how many there are. grid: rows of places, at most."""

    model_type = "tinyfm_classifier"

    def __init__(self, body: dict | None = None, features: int = 1, grid: int = 4, **others):
        self.body = body
        self.features = features
        self.grid = grid
        super().__init__(**others)


class TinyfmClassifier(PreTrainedModel):
    """A body and a head; a subclass says how features are read from the body."""

    config_class = TinyfmClassifierConfig

    def __init__(self, config: TinyfmClassifierConfig):
        super().__init__(config)
        body = AutoConfig.for_model(**config.body)
        # BERT and RoBERTa would add a layer that is not read here.
        options = {"add_pooling_layer": False} if body.model_type in ("bert", "roberta") else {}
        self.body = AutoModel.from_config(body, **options)
        self.head = nn.Linear(config.features, config.num_labels)
        self.post_init()

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, number of classes)."""
        x = F.layer_norm(features.float(), features.shape[1:]) * WIDTH / features.size(1)
        return self.head(x.to(self.head.weight.dtype)).float()


class TinyfmTextClassifier(TinyfmClassifier):
    """Classify texts, padded on the right and cut to the body's context."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None, **_):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        T = self.body.config.max_position_embeddings
        if self.body.config.model_type == "xlnet":  # any length is possible: that of training
            T = self.body.config.context_length
        if self.body.config.model_type == "roberta":  # positions up to that of padding are unused
            T -= self.body.config.pad_token_id + 1
        mask = attention_mask[:, :T]
        output = self.body(input_ids=input_ids[:, :T], attention_mask=mask)
        states = output.last_hidden_state.float() * mask[..., None]  # (B, T, D)
        features = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.classify(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TinyfmImageClassifier(TinyfmClassifier):
    """Classify pictures by the states of CLIP's image tower."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, labels=None, **_):
        states = self.body(pixel_values=pixel_values).last_hidden_state
        states = self.body.post_layernorm(states)  # (B, P + 1, D)
        rows = self.body.config.image_size // self.body.config.patch_size
        patches = states[:, 1:].transpose(1, 2).unflatten(2, (rows, rows))  # (B, D, rows, rows)
        grid = min(self.config.grid, rows)
        places = F.adaptive_avg_pool2d(patches, (grid, grid)).flatten(1)
        logits = self.classify(torch.cat((states[:, 0], places), dim=1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
