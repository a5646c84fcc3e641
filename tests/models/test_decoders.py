"""MAE's decoder: the same numbers as the way round of sorting the tokens back and predicting all of them."""

from __future__ import annotations

import torch

from fastssl.models.decoders import MAEDecoder


def make_inputs(visible: int = 3):
    torch.manual_seed(0)
    decoder = MAEDecoder(24, (4, 4), 12, width=16, depth=2, heads=2).double()
    torch.nn.init.normal_(decoder.mask_token)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    tokens = torch.randn(2, 1 + visible, 24, dtype=torch.float64, requires_grad=True)
    return decoder, tokens, order[:, :visible], order[:, visible:]


def decode_all_in_order(decoder, tokens, keep, masked):
    """Every patch at its own place, one by one; all are predicted."""
    x = decoder.embed(tokens)
    canvas = []
    for b in range(len(x)):
        rows = [decoder.mask_token[0, 0]] * 16
        for slot, patch in enumerate(keep[b].tolist()):
            rows[patch] = x[b, 1 + slot]
        canvas.append(torch.stack([x[b, 0], *rows]) + decoder.pos_embed[0])
    x = torch.stack(canvas)
    for block in decoder.blocks:
        x = block(x)
    everything = decoder.pred(decoder.norm(x))[:, 1:]
    return torch.stack([everything[b, masked[b]] for b in range(len(x))])


def test_values_and_gradients_against_the_sorted_way():
    decoder, tokens, keep, masked = make_inputs()
    upstream = torch.randn(2, 13, 12, dtype=torch.float64)
    results = []
    for decode in (decoder, lambda *a: decode_all_in_order(decoder, *a)):
        decoder.zero_grad()
        tokens.grad = None
        prediction = decode(tokens, keep, masked)
        prediction.backward(upstream)
        grads = [p.grad.clone() for p in decoder.parameters() if p.requires_grad]
        results.append([prediction.detach(), tokens.grad.clone(), *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_order_of_the_masked_list_only_reorders():
    decoder, tokens, keep, masked = make_inputs()
    torch.testing.assert_close(decoder(tokens, keep, masked.flip(1)), decoder(tokens, keep, masked).flip(1))


def test_size_of_the_published_decoder():
    with torch.device("meta"):
        decoder = MAEDecoder(768, (14, 14), 768, width=512, depth=8, heads=16)
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 26_008_320
    assert not decoder.pos_embed.requires_grad
