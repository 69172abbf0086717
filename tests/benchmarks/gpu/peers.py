"""How two public projects record a UNet's cross-attention, as processors of a layer: what ours is measured beside."""

import math

import torch
from einops import rearrange


class Daam:
    """castorini/daam, daam/trace.py, UNetCrossAttentionHooker: every head's map of every token, added up over passes.

    Not taken over: dropping the unconditional half of the batch, as only the conditional one is run here.
    """

    def __init__(self, layer, heat_maps):
        self.layer, self.heat_maps = layer, heat_maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            attn.head_to_batch_dim(x)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        side = math.isqrt(probabilities.shape[1])
        # "skip if too large": factor 8 of 64
        if side != 8:
            maps = [m.view(m.shape[0], side, side) for m in probabilities.permute(2, 0, 1).float()]
            for head, heat_map in enumerate(torch.stack(maps, 0).permute(1, 0, 2, 3).contiguous()):
                self.heat_maps[side, self.layer, head] = self.heat_maps[side, self.layer, head] + heat_map
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value))))


class AttentionMapDiffusers:
    """wooyeolbaek/attention-map-diffusers, attention_map_diffusers/modules.py, attn_call2_0 and its hook in utils.py:
    attention in plain operations, and the map of every layer, head and token kept, for every time step."""

    def __init__(self, layer, attn_maps):
        self.layer, self.attn_maps = layer, attn_maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            rearrange(x, "b l (h d) -> b h l d", h=attn.heads)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        weight = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]))
        # its attn_bias, empty without a mask
        weight += torch.zeros(query.shape[-2], key.shape[-2], dtype=query.dtype, device=query.device)
        weight = torch.softmax(weight, dim=-1)
        out = torch.dropout(weight, 0.0, train=True) @ value
        side = math.isqrt(query.shape[-2])
        self.attn_maps[self.layer] = rearrange(weight, "b h (y x) l -> b h y x l", y=side).cpu()
        return attn.to_out[1](attn.to_out[0](rearrange(out, "b h q d -> b q (h d)")))
