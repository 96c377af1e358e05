"""
A GPT in one file: the modern one by default, GPT-2 itself by switches of the same config, and the cache that makes sampling fast.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    logits, loss = model(idx, targets)                   # training
    logits, _ = model(idx, cache=KVCache(...))           # inference, only the new tokens
    model = GPT.load("out/stdlib/ckpt.pt")               # or a Hugging Face folder; and train.py, sample.py for the rest

What the parts are and where they come from:
    pre-norm residual blocks, GPT-2's init          Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    RoPE, rotary positions                          Su et al. 2021, arXiv:2104.09864
    grouped queries (GQA), one kv head (MQA)        Ainslie et al. 2023, arXiv:2305.13245; Shazeer 2019, arXiv:1911.02150
    RMSNorm                                         Zhang and Sennrich 2019, arXiv:1910.07467
    SwiGLU; ReLU^2                                  Shazeer 2020, arXiv:2002.05202; So et al. 2021, arXiv:2109.08668
    QK-norm                                         Henry et al. 2020, arXiv:2010.04245
    logit soft-cap                                  Gemma 2, arXiv:2408.00118
    LoRA, fine-tuning at low rank                   Hu et al. 2021, arXiv:2106.09685
    Muon for hidden matrices                        Jordan et al. 2024, kellerjordan.github.io/posts/muon

Notation: B batch, T new tokens, S keys (cached and new), H query heads, K kv heads, D head dim, C = n_embd (H*D unless
head_size says otherwise), V vocab_size.
"""
import contextlib, json, math, os, re
from dataclasses import fields, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flash_attn
from config import GPTConfig

# ---------------------------------------------------------------------------- positions

def rope_table(config):
    """
    cos and sin of every position's rotation angles, each (block_size, D/2); pair d turns by position / theta^(2d/D). Scaling stretches
    a model trained at block_size / s to block_size, s = rope_factor: linear (arXiv:2306.15595) slows every pair by s; ntk (bloc97 2023)
    raises theta so that only the slowest pair does; yarn (arXiv:2309.00071) and llama3 (arXiv:2407.21783) slow those that turn less than
    once in the trained context, leave those that turn often, and blend between; yarn also sharpens the attention.
    """
    s, D, sharpen = config.rope_factor, config.head_dim, 1.0
    theta = config.rope_theta * s ** (D / max(D - 2, 1)) if config.rope_scaling == "ntk" else config.rope_theta
    frequency = theta ** -(torch.arange(0, D, 2, dtype=torch.float64, device="cpu") / D)    # a real table in a model of meta weights, too
    if config.rope_scaling == "linear": frequency /= s
    elif config.rope_scaling in ("yarn", "llama3"):
        often = 32 if config.rope_scaling == "yarn" else 4
        keep = ((config.trained_length * frequency / (2 * math.pi) - 1) / (often - 1)).clamp(0, 1)
        frequency *= keep + (1 - keep) / s
        if config.rope_scaling == "yarn": sharpen = 0.1 * math.log(s) + 1
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64, device="cpu"), frequency)
    return (sharpen * angle.cos()).float(), (sharpen * angle.sin()).float()


def apply_rope(x, cos, sin):
    """
    Rotate the pairs (x[d], x[d + D/2]) of x (B, H, T, D), as one complex product (x1 + i x2)(cos + i sin), so that q.k
    depends on the distance alone. cos, sin: (T, D/2), or (B, 1, T, D/2) where rows stand at different positions.
    subtle: Llama's published code pairs (x[2d], x[2d+1]); the halves used here and by Hugging Face are the same up to a permutation.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def sinusoidal_table(config):
    """Vaswani et al. 2017, arXiv:1706.03762, section 3.5: sines in the even columns, cosines in the odd; (block_size, C)."""
    frequency = 10000.0 ** -(torch.arange(0, config.n_embd, 2, dtype=torch.float64, device="cpu") / config.n_embd)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64, device="cpu"), frequency)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()

# ---------------------------------------------------------------------------- attention and its cache

class KVCache:
    """
    Keys and values of every layer, allocated once: k, v (n_layer, B, K, max_len, D). Row b holds lengths[b] valid positions, so
    prompts of different lengths share a batch: feed them right-padded, then `set_lengths(true lengths)`; what stands beyond a row's
    length is never seen and overwritten later. Memory: 2 * n_layer * B * K * max_len * D * bytes per element. A static cache has one
    shape in every step, all of max_len, as compiled steps and CUDA graphs want it.
    """
    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.kv_heads, max_len, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.max_len, self.end, self.ragged, self.static = max_len, 0, False, False    # end: the longest row, known on the host
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)

    @property
    def span(self):
        """S, the keys that attention is given."""
        return self.max_len if self.static else self.end

    def set_lengths(self, lengths):
        """lengths: one int per row. Forget everything beyond them; all zero empties the cache."""
        if len(lengths) != len(self.lengths) or max(lengths) > self.max_len:
            raise ValueError(f"lengths {list(lengths)} do not fit {len(self.lengths)} rows of {self.max_len} positions")
        self.end = 0 if self.static else max(lengths)       # a static cache must not show a number that changes to the compiler
        self.ragged = self.static or min(lengths) != max(lengths)
        self.lengths.copy_(torch.tensor(lengths))

    def reorder(self, rows):
        """Row b becomes what row rows[b] was, for beams; fewer rows than before drop the others."""
        rows = torch.as_tensor(rows, device=self.k.device)
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]

    def grow(self, T):
        """Make room for T new tokens a row and return their positions: (T,), or (B, T) where rows differ."""
        if self.end + T > self.max_len:
            raise ValueError(f"the cache holds {self.end} of {self.max_len} tokens: no room for {T} more")
        pos = torch.arange(T, device=self.k.device) + (self.lengths[:, None] if self.ragged else self.end)
        self.lengths += T
        if not self.static: self.end += T
        return pos

    def update(self, layer, pos, k, v):
        """Write the new k, v (B, K, T, D) of one layer at pos; return all that is valid so far, (B, K, S, D)."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.ragged:     # subtle: indices around a slice put (B, T) first and K after them
                store[torch.arange(len(new), device=new.device)[:, None], :, pos] = new.transpose(1, 2).to(store.dtype)
            else:
                store[:, :, self.end - new.shape[2]:self.end] = new
        return self.k[layer, :, :, :self.span], self.v[layer, :, :, :self.span]


def attention_backend(config, device, training=True):
    """("flash_attn", line) where our Triton kernels run on this device, else ("sdpa", line); the line tells the user which and why."""
    if device.type != "cuda": return "sdpa", "torch SDPA (no CUDA device, which the Triton kernels need)"
    q = torch.empty(1, 1, 1, config.head_dim, device=device, dtype=torch.bfloat16)
    why_not = flash_attn.why_not(q, q, q, dropout_p=config.dropout if training else 0.0)
    return ("flash_attn", "flash_attn.py, Triton kernels") if why_not is None else ("sdpa", f"torch SDPA ({why_not})")


def sdpa_mask(pos, S, window=0, doc_start=None):
    """
    True where the query at pos, (T,) or (B, T), sees key j of S: j <= pos, j > pos - window if there is one, j >= doc_start (B, T); as
    (T, S) or (B, 1, T, S). None where SDPA needs no mask: T == S is what is_causal means, and one query alone sees all its keys.
    """
    j, p = torch.arange(S, device=pos.device), pos[..., None]
    if pos.dim() == 1 and len(pos) in (1, S) and doc_start is None and not 0 < window < S: return None
    seen = j <= p
    if window: seen = seen & (j > p - window)
    if doc_start is not None: seen = seen & (j >= doc_start[..., None])
    return seen[:, None] if seen.dim() == 3 else seen


def attention(q, k, v, backend="sdpa", cache=None, window=0, mask=None, dropout_p=0.0):
    """
    Causal attention of q (B, H, T, D) over k, v (B, K, S, D), the one place where the backend matters. mask: sdpa_mask's, which says it
    all, or, for flash_attn, which sees to causality, window and the rows' lengths by itself, doc_start.
    """
    T, S = q.shape[2], k.shape[2]
    if backend == "flash_attn":
        if cache is None or T == S and not cache.ragged: return flash_attn.flash_attention(q, k, v, window=window, doc_start=mask)
        return flash_attn.flash_decode(q, k, v, cache.lengths, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None and T > 1,
                                          enable_gqa=q.shape[1] != k.shape[1])

# ---------------------------------------------------------------------------- the blocks

class Norm(nn.Module):
    """Over the last dimension: LayerNorm with a gain, or RMSNorm, with one if norm_gain (if not, the next matrix absorbs it)."""
    def __init__(self, config, size, layernorm=False):
        super().__init__()
        self.shape, self.eps, self.layernorm = (size,), config.norm_eps, layernorm
        self.weight = nn.Parameter(torch.ones(size)) if layernorm or config.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(size)) if layernorm and config.bias else None

    def forward(self, x):
        if self.layernorm: return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        x = F.rms_norm(x, self.shape, eps=self.eps)
        return x if self.weight is None else x * self.weight.to(x.dtype)


class LoRALinear(nn.Linear):
    """
    A frozen linear layer plus a learned low-rank B A: y = x W^T + x A^T B^T, A (rank, in) Gaussian, B (out, rank) zero, so it starts as the
    layer it was. Hu et al. 2021, arXiv:2106.09685; their factor alpha / rank is 1 here, for it only rescales the learning rate (section 4.1).
    """
    def __init__(self, linear, rank):
        nn.Module.__init__(self)
        self.weight, self.bias, self.on = linear.weight, linear.bias, True
        self.lora_a = nn.Parameter(torch.randn(rank, self.weight.shape[1], device=self.weight.device) / math.sqrt(self.weight.shape[1]))
        self.lora_b = nn.Parameter(self.weight.new_zeros(len(self.weight), rank, dtype=torch.float32))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) if self.on else y

    def merged(self):
        """The plain layer that computes the same."""
        linear = nn.Linear(*self.weight.T.shape, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter((self.weight + self.lora_b @ self.lora_a).to(self.weight.dtype).detach()), self.bias
        return linear


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.window, self.backend = config, layer, config.windows[layer], "sdpa"
        C, HD, kv = config.n_embd, config.n_head * config.head_dim, config.kv_heads * config.head_dim
        self.c_q = nn.Linear(C, HD, bias=config.bias)   # three matrices, not one: Muon orthogonalises each on its own
        self.c_k = nn.Linear(C, kv, bias=config.bias)
        self.c_v = nn.Linear(C, kv, bias=config.bias)
        self.c_proj = nn.Linear(HD, C, bias=config.bias)
        if config.qk_norm: self.q_norm, self.k_norm = Norm(config, config.head_dim), Norm(config, config.head_dim)

    def qkv(self, x, rope):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), normalised and rotated as they meet in the dot product."""
        B, T, D = *x.shape[:2], self.config.head_dim
        q = self.c_q(x).view(B, T, -1, D).transpose(1, 2)       # (B, H, T, D)
        k = self.c_k(x).view(B, T, -1, D).transpose(1, 2)       # (B, K, T, D)
        v = self.c_v(x).view(B, T, -1, D).transpose(1, 2)       # (B, K, T, D)
        if self.config.qk_norm: q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None: q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q.type_as(v), k.type_as(v), v

    def forward(self, x, rope, cache, pos, masks):
        q, k, v = self.qkv(x, rope)
        if cache is not None: k, v = cache.update(self.layer, pos, k, v)       # (B, K, S, D)
        y = attention(q, k, v, self.backend, cache, self.window, masks[self.window], self.config.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)                                        # (B, T, H*D)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_gate = nn.Linear(config.n_embd, config.inner, bias=config.bias) if config.mlp == "swiglu" else None
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        h = self.c_fc(x)
        if self.config.mlp == "relu2": h = F.relu(h).square()
        elif self.config.mlp == "gelu": h = F.gelu(h, approximate="tanh")      # GPT-2's own approximation
        else: h = F.silu(self.c_gate(x)) * h
        return F.dropout(self.c_proj(h), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        layernorm = config.norm == "layernorm"
        self.ln_1, self.attn = Norm(config, config.n_embd, layernorm), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = Norm(config, config.n_embd, layernorm), MLP(config)

    def forward(self, x, rope, cache, pos, masks):
        x = x + self.attn(self.ln_1(x), rope, cache, pos, masks)
        return x + self.mlp(self.ln_2(x))

# ---------------------------------------------------------------------------- the loss

class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of softmax(cap * tanh(x W^T / cap)) against targets, without the (N, V) logits: `rows` of them exist at a time, and
    their gradient, softmax - onehot, is turned into dx and dW at once, so the backward pass only scales. x (N, C), W (V, C), targets (N) with
    -1 = ignore, cap 0 = none. Wijmans et al. 2024, arXiv:2411.09009 has the idea.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, cap, rows=None):
        rows = rows or (2048 if x.is_cuda else 512)             # on a CPU few enough to stay in its cache, a fifth faster
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, w, train = x.to(dtype), weight.to(dtype), any(ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            share = (targets >= 0) / (targets >= 0).sum().clamp(min=1)                          # (N) of each row in the mean
            loss = torch.zeros((), device=x.device)
            dx, dw = torch.empty_like(x) if train else None, torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            for i in range(0, len(x), rows):
                part, k, t = x[i:i + rows], share[i:i + rows, None], targets[i:i + rows, None].clamp(min=0)     # k, t (rows, 1)
                logits = (part @ w.T).float()                                                   # (rows, V), from here on in place
                if cap:
                    logits.div_(cap).tanh_()
                    slope = 1 - logits.square()                                                 # tanh' = 1 - tanh^2
                    logits *= cap
                logits -= logits.amax(-1, keepdim=True)
                right, p = logits.gather(1, t), logits.exp_()
                total = p.sum(-1, keepdim=True)
                loss += (k * (total.log() - right)).sum()
                if train:
                    g = p.mul_(k / total).scatter_add_(1, t, -k)
                    if cap: g *= slope
                    g = g.to(dtype)
                    dx[i:i + rows] = g @ w
                    if dw is not None: dw += g.T @ part     # a frozen head needs none
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return dx * scale, None if dw is None else dw * scale, None, None, None

# ---------------------------------------------------------------------------- the model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=Norm(config, config.n_embd, config.norm == "layernorm")))
        if config.pos == "learned": self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights: self.lm_head.weight = self.transformer.wte.weight
        tables = rope_table(config) if config.pos == "rope" else (sinusoidal_table(config),) if config.pos == "sinusoidal" else ()
        for i, table in enumerate(tables): self.register_buffer(f"table{i}", table, persistent=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):      # what a block adds to the stream: nothing at first, or GPT-2's 1/sqrt(2L)
                nn.init.zeros_(p) if config.zero_init else nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if config.zero_init: nn.init.zeros_(self.lm_head.weight)
        self.backend, self.grad_checkpoint = None, False
        self.doc_mask = None        # the end-of-text id, which begins a document: without a cache, no token sees what is before its own

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None: nn.init.zeros_(module.bias)

    def set_backend(self, training=True):
        """Choose the attention backend for the device that the weights are on; returns the line that says which and why."""
        self.backend, line = attention_backend(self.config, self.transformer.wte.weight.device, training)
        for block in self.transformer.h: block.attn.backend = self.backend
        return line

    def lora_layers(self):
        """(attention, name, layer) of the matrices that LoRA adapts: four in every block."""
        return [(block.attn, name, getattr(block.attn, name)) for block in self.transformer.h for name in ("c_q", "c_k", "c_v", "c_proj")]

    def add_lora(self, rank):
        """Freeze every weight and learn a low-rank addition to the attention's matrices instead, until merge_lora."""
        self.requires_grad_(False)
        for attn, name, linear in self.lora_layers(): setattr(attn, name, LoRALinear(linear, rank))

    def merge_lora(self):
        """A plain model again, with the same logits."""
        for attn, name, linear in self.lora_layers(): setattr(attn, name, linear.merged())

    def use_lora(self, on):
        """False: compute what the model did before it was fine-tuned, until True."""
        for _, _, linear in self.lora_layers(): linear.on = on

    def forward(self, idx, targets=None, cache=None, by_row=False):
        """
        idx (B, T) token ids -> (logits (B, T, V), None), or with targets (B, T; -1 = ignore) -> (None, mean loss in nats per token), or
        by_row the log-probability of each row's targets (B,). With a cache, idx are the tokens after those it holds, and join it.
        """
        x = self.hidden(idx, cache)
        if targets is None: return self.head(x), None
        if by_row: return None, self.log_probs(x, targets)
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.logit_softcap)

    def hidden(self, idx, cache=None):
        """idx (B, T) -> what the head reads, (B, T, C); whoever needs few positions' logits calls head on those alone."""
        if self.backend is None: self.set_backend(self.training)
        T, past = idx.shape[1], cache.end if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size={self.config.block_size}: shorten the text or train with a larger one")
        pos = cache.grow(T) if cache is not None else torch.arange(T, device=idx.device)        # (T,) or (B, T)
        x = self.transformer.wte(idx)                                                           # (B, T, C)
        if self.config.pos == "learned": x = x + self.transformer.wpe(pos)
        elif self.config.pos == "sinusoidal": x = x + self.table0[pos].type_as(x)
        x = F.dropout(x, self.config.dropout, self.training)
        rope = None
        if self.config.pos == "rope":
            rope = tuple(t[pos] if pos.dim() == 1 else t[pos][:, None] for t in (self.table0, self.table1))
        starts = None if self.doc_mask is None or cache is not None else torch.where(idx == self.doc_mask, pos, 0).cummax(1).values     # (B, T)
        masks = {window: starts if self.backend == "flash_attn" else sdpa_mask(pos, T if cache is None else cache.span, window, starts)
                 for window in set(self.config.windows)}                                        # made once, not in every layer
        again = self.grad_checkpoint and self.training and cache is None
        for block in self.transformer.h:
            x = checkpoint(block, x, rope, cache, pos, masks, use_reentrant=False) if again else block(x, rope, cache, pos, masks)
        return self.transformer.ln_f(x)

    def head(self, x):
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def log_probs(self, x, targets):
        """x (B, T, C) as hidden gives it, targets (B, T; -1 = ignore) -> each row's log-probability (B,), in nats, differentiable."""
        keep = targets >= 0
        nats = F.cross_entropy(self.head(x[keep]).float(), targets[keep], reduction="none")
        return -nats.new_zeros(targets.shape).masked_scatter(keep, nats).sum(1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self):
        """
        Training FLOPs per token, forward and backward: 6 per weight that multiplies an activation (so not the embedding look-ups), 4 if
        it is frozen, and 12*H*D*T a layer for the attention matrix (its window instead of T), not halved for causality; PaLM, arXiv:2204.02311, appendix B.
        """
        looked_up = [m.weight for name, m in self.transformer.items() if name == "wpe" or name == "wte" and not self.config.tie_weights]
        weights = [p for p in self.parameters() if not any(p is q for q in looked_up)]
        seen = sum(min(window or self.config.block_size, self.config.block_size) for window in self.config.windows)
        attention = 12 * self.config.n_head * self.config.head_dim * seen
        return sum(p.numel() * (6 if p.requires_grad else 4) for p in weights) + attention

    def configure_optimizers(self, cfg):
        """
        cfg: a config.Config -> list of optimizers, each parameter in exactly one group. adamw: weight decay on matrices, none on gains
        and biases (GPT-3, arXiv:2005.14165). muon: the blocks' matrices to Muon, the embedding, the head and the rest to AdamW.
        With LoRA its own matrices go to AdamW, and nothing else.
        """
        make = lambda kind, groups, **kw: kind(groups, **kw)
        if cfg.shard_optimizer:
            from torch.distributed.optim import ZeroRedundancyOptimizer     # here, for importing it takes a second
            make = lambda kind, groups, **kw: ZeroRedundancyOptimizer(groups, kind, **kw)
        blocks, fused = list(self.transformer.h.parameters()), self.lm_head.weight.device.type in ("cuda", "cpu")
        matrices = [p for p in blocks if p.dim() == 2]
        head = [] if self.config.tie_weights else [self.lm_head.weight]
        embeddings = [m.weight for name, m in self.transformer.items() if name in ("wte", "wpe")]
        rest = [p for p in self.parameters() if p.dim() < 2]
        lora = [p for name, p in self.named_parameters() if ".lora_" in name]
        if lora: groups = [dict(params=lora, weight_decay=cfg.weight_decay)]
        elif cfg.optimizer == "adamw":
            groups = [dict(params=matrices + head + embeddings, weight_decay=cfg.weight_decay), dict(params=rest)]
        else:
            groups = [dict(params=embeddings, lr=cfg.embedding_lr), dict(params=head, lr=cfg.unembedding_lr), dict(params=rest)]
        optimizers = [make(torch.optim.AdamW, [g for g in groups if g["params"]], lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                           eps=1e-8 if cfg.optimizer == "adamw" else 1e-10, weight_decay=0.0, fused=fused)]
        if cfg.optimizer == "muon" and not lora:
            optimizers.append(make(torch.optim.Muon, matrices, lr=cfg.matrix_lr, weight_decay=cfg.weight_decay, momentum=0.95))
        return optimizers

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
        """
        Continue idx (B, T) by max_new_tokens: (B, T + max_new_tokens); temperature 0 is argmax. When the context is full, its newer
        half is read again and generation goes on, so the length has no limit. sample.py has what else one may want.
        """
        weight, size, new = self.lm_head.weight, self.config.block_size, idx
        cache = KVCache(self.config, len(idx), min(size, idx.shape[1] + max_new_tokens), weight.device, weight.dtype)
        for _ in range(max_new_tokens):
            if cache.end + new.shape[1] > size:
                cache.set_lengths([0] * len(idx))
                new = idx[:, -max(size // 2, 1):]
            logits = self.head(self.hidden(new, cache)[:, -1])
            if temperature == 0: new = logits.argmax(-1, keepdim=True)
            else: new = torch.multinomial(filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a checkpoint file, LoRA merged, or of a Hugging Face folder, in evaluation mode."""
        return load_hf(path, device) if os.path.isdir(path) else cls.from_checkpoint(load_checkpoint(path), path).to(device)

    @classmethod
    def from_checkpoint(cls, checkpoint, path="checkpoint"):
        try:
            known = {f.name for f in fields(GPTConfig)}
            model = cls(GPTConfig(**{k: v for k, v in checkpoint["config"].items() if k in known}))
            if rank := checkpoint["config"].get("lora_rank"): model.add_lora(rank)
            model.load_state_dict(checkpoint["model"])
            if rank: model.merge_lora()
        except (KeyError, RuntimeError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not a checkpoint of this project's model: {str(e).splitlines()[0]}") from None
        return model.eval()


def filter_logits(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """
    logits (B, V) -> logits / temperature with what may not be drawn at -inf: outside the k likeliest, outside the likeliest that add up
    to top_p (Holtzman et al. 2020, arXiv:1904.09751), or less than min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p            # a token stays if those before it do not reach top_p yet: the first always does
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits

# ---------------------------------------------------------------------------- Hugging Face folders, in and out

# Each architecture as a GPTConfig; what its config.json calls our fields; what it calls our parameters (replace in this order)
HF_SHAPE = {"gpt2": dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False, logit_softcap=0.0),
            "llama": dict(pos="rope", norm="rmsnorm", norm_gain=True, mlp="swiglu", qk_norm=False, logit_softcap=0.0)}
HF_KEYS = {"gpt2": dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd", n_inner="n_inner",
                        norm_eps="layer_norm_epsilon", tie_weights="tie_word_embeddings"),
           "llama": dict(block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers", n_head="num_attention_heads",
                         n_kv_head="num_key_value_heads", n_embd="hidden_size", n_inner="intermediate_size", head_size="head_dim",
                         norm_eps="rms_norm_eps", rope_theta="rope_theta", bias="attention_bias", tie_weights="tie_word_embeddings")}
HF_NAMES = {"gpt2": {"c_q": "c_attn", "c_k": "c_attn", "c_v": "c_attn"},
            "llama": {"transformer.h": "model.layers", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
                      "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "attn.o_proj", "attn.": "self_attn.",
                      "c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_fc": "up_proj", "c_gate": "gate_proj", "c_proj": "down_proj"}}
HF_SHAPE["qwen3"], HF_KEYS["qwen3"], HF_NAMES["qwen3"] = HF_SHAPE["llama"] | dict(qk_norm=True, bias=False), HF_KEYS["llama"], HF_NAMES["llama"]
# what a key of config.json, if it is there, may say; what it means if it is not there
HF_ALLOWED = dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                  add_cross_attention=(False,), hidden_act=("silu", "relu"), rope_type=("default", "linear", "llama3"), low_freq_factor=(1, None),
                  high_freq_factor=(4, None), partial_rotary_factor=(1, None), use_sliding_window=(False,), quantization_config=(None,))
HF_ABSENT = dict(n_inner=0, num_key_value_heads=0, attention_bias=False, rope_theta=10000.0)


def safetensors():
    try: import safetensors, safetensors.torch
    except ImportError: raise ValueError("Hugging Face folders need safetensors: pip install safetensors") from None
    return safetensors


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f: return dict(json.load(f))
    except FileNotFoundError: raise ValueError(f"{path} is missing: a Hugging Face folder has a config.json and safetensors") from None
    except (ValueError, TypeError) as e: raise ValueError(f"{path} is damaged: {e}") from None


def hf_config(folder):
    """(architecture, GPTConfig) from the folder's config.json, of transformers 4 or 5. ValueError names everything in it that we cannot be."""
    path = os.path.join(folder, "config.json")
    d = read_json(path)
    d |= d.get("rope_scaling") or d.get("rope_parameters") or {}
    family, kind, factor = d.get("model_type"), d.setdefault("rope_type", d.get("type", "default")), d.get("factor") or 1
    if family not in HF_SHAPE: raise ValueError(f"{path}: its architecture is {family!r}, and only {', '.join(HF_SHAPE)} can be read")
    wrong = [f"{key}={d[key]!r}" for key, allowed in HF_ALLOWED.items() if key in d and d[key] not in allowed]
    if bool(d.get("attention_bias")) != bool(d.get("mlp_bias")): wrong.append("biases in attention or MLP alone (attention_bias, mlp_bias)")
    if set(d.get("layer_types") or ()) - {"full_attention"}: wrong.append("layer_types other than full_attention")
    if wrong: raise ValueError(f"{path} asks for what this model does not have: {', '.join(wrong)}")
    absent = HF_ABSENT | dict(tie_word_embeddings=family == "gpt2") | (dict(head_dim=0) if family == "llama" else {})
    try:
        shape = HF_SHAPE[family] | {ours: (d if d.get(key) is not None else absent)[key] for ours, key in HF_KEYS[family].items()}
        if kind != "default" and factor != 1:
            shape |= dict(rope_scaling=kind, rope_factor=float(factor), rope_trained=d.get("original_max_position_embeddings") or shape["block_size"])
        if d.get("hidden_act") == "relu": shape["mlp"] = "relu2"        # relu(gate) * up, where load_hf finds gate = up
        return family, GPTConfig(**shape, zero_init=False)
    except KeyError as e: raise ValueError(f"{path} does not say {e}") from None
    except (TypeError, ValueError) as e: raise ValueError(f"{path}: {e}") from None


def hf_tensors(config, family):
    """{their name: ({our name: its tensor, on meta}, turned)}: ours, one below the other, make theirs, and Conv1D has it turned around."""
    with torch.device("meta"): model, found = GPT(replace(config, **HF_SHAPE[family], n_inner=config.inner)), {}
    for name, p in model.named_parameters():        # a tied head is not among them, nor in their files
        theirs = name
        for ours, new in HF_NAMES[family].items(): theirs = theirs.replace(ours, new)
        found.setdefault(theirs, ({}, family == "gpt2" and ".h." in name and p.dim() == 2))[0][name] = p
    return found


def join(tensors, turned):
    t = torch.cat(list(tensors))
    return t.T.contiguous() if turned else t


def hf_headers(folder, family):
    """{their name: (file, its name there, shape)} of all tensors, from the files' headers alone. ValueError for what is missing or damaged."""
    st, index, base, found = safetensors(), os.path.join(folder, "model.safetensors.index.json"), "transformer." if family == "gpt2" else "model.", {}
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if os.path.exists(index) else ["model.safetensors"]
    if gone := [name for name in names if not os.path.isfile(os.path.join(folder, name))]:
        raise ValueError(f"{folder}: {gone[0]} is missing ({len(gone)} of {len(names)} safetensors files): download it")
    for path in (os.path.join(folder, name) for name in names):
        try:
            with st.safe_open(path, "pt") as f: tensors = {key: f.get_slice(key) for key in f.keys()}
            for key, t in tensors.items():
                if re.search(r"\.attn\.(masked_)?bias$|inv_freq$", key): continue         # masks and tables that old files keep
                if t.get_dtype() not in ("F16", "BF16", "F32", "F64"): raise ValueError(f"{path}: {key} is {t.get_dtype()}, quantised")
                found[key if key.startswith((base, "lm_head.")) else base + key] = path, key, tuple(t.get_shape())     # GPT-2's own file has no base
        except (st.SafetensorError, OSError) as e: raise ValueError(f"{path} is damaged ({e}): download it again") from None
    return found


def load_hf(folder, device="cpu", dtype=torch.float32, config=None):
    """
    The GPT of a Hugging Face folder, in evaluation mode; config: hf_config's, with another block_size, RoPE scaling or dropout. All is
    checked before the first tensor is read, then one is read at a time: memory holds the model and one of its matrices.
    """
    (family, found), st = hf_config(folder), safetensors()
    tensors, files, state, config = hf_tensors(found, family), hf_headers(folder, family), {}, config or found
    def read(name):     # subtle: opened each time anew, for what a file has mapped counts as ours until it is closed
        with st.safe_open(files[name][0], "pt") as f: return f.get_tensor(files[name][1])
    again = files.pop("lm_head.weight", None) if found.tie_weights else None         # some files keep the tied head a second time
    shapes = {name: tuple(join(parts.values(), turned).shape) for name, (parts, turned) in tensors.items()}
    for what, names in (("lacks", shapes.keys() - files.keys()), ("has, unasked for,", files.keys() - shapes.keys()),
                        ("has the wrong shape of", {n for n in shapes.keys() & files.keys() if shapes[n] != files[n][2]})):
        if names: raise ValueError(f"{folder} {what} {min(names)}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
                                   + (f": {list(files[min(names)][2])}, not {list(shapes[min(names)])}" if "shape" in what else ""))
    for name, (parts, turned) in tensors.items():
        whole = read(name)
        for ours, t in zip(parts, (whole.T if turned else whole).split([len(p) for p in parts.values()])):
            if ours == "transformer.wpe.weight": t = t[:config.block_size]
            state[ours] = torch.empty(t.shape, dtype=dtype, device=device).copy_(t)
            if config.mlp == "relu2" and "c_gate" in ours and not torch.equal(state.pop(ours), state[ours.replace("c_gate", "c_fc")]):
                raise ValueError(f"{folder}: hidden_act='relu' with a gate of its own: only relu(x) * x is ours, gate_proj = up_proj")
    if again:
        files["lm_head.weight"] = again
        embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        if not torch.equal(read("lm_head.weight"), read(embedding)):
            raise ValueError(f"{folder}: tie_word_embeddings=True, and yet lm_head.weight is not the embedding")
    with torch.device("meta"): model = GPT(config)
    if config.tie_weights: state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_weights: model.lm_head.weight = model.transformer.wte.weight      # assigned one by one, they came apart
    return model.to(device).eval()


def save_hf(model, folder, dtype=torch.float32, begin=None, end=None):
    """
    Write config.json and model.safetensors as GPT-2, Llama or Qwen3, whichever has what the model has, and return its name; begin, end: ids
    of the tokens that a text begins and ends with. What theirs have and ours lack is filled in, biases of zero and gains of one; ReLU^2 is their relu(gate) * up with gate = up.
    """
    c, st = model.config, safetensors()
    family = "gpt2" if c.pos == "learned" else "qwen3" if c.qk_norm else "llama"
    filled = (("bias", False, True), ("norm_gain", False, True), ("mlp", "relu2", "swiglu"))
    wrong = [f"{k}={ours!r}" for k, v in HF_SHAPE[family].items() if (ours := getattr(c, k)) != v and (k, ours, v) not in filled]
    if any(c.windows): wrong.append(f"window_pattern={c.window_pattern!r}")
    if c.rope_scaling in ("ntk", "yarn"): wrong.append(f"rope_scaling={c.rope_scaling!r}")
    if family == "gpt2" and c.kv_heads != c.n_head: wrong.append(f"n_kv_head={c.n_kv_head}")
    if family == "gpt2" and c.n_head * c.head_dim != c.n_embd: wrong.append(f"head_size={c.head_size}")
    if family == "llama" and c.n_embd % c.n_head: wrong.append(f"n_embd={c.n_embd} that n_head={c.n_head} does not divide")
    if wrong: raise ValueError(f"no export: transformers' {family} has no {', '.join(wrong)}")
    full = replace(c, n_kv_head=c.kv_heads, head_size=c.head_dim, n_inner=c.inner)
    d = {theirs: getattr(full, ours) for ours, theirs in HF_KEYS[family].items()}
    if family == "gpt2": d |= dict(activation_function="gelu_new", resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    else: d |= dict(hidden_act="relu" if c.mlp == "relu2" else "silu", mlp_bias=c.bias)
    if c.rope_scaling != "none":
        d["rope_scaling"] = dict(rope_type=c.rope_scaling, factor=c.rope_factor)
        if c.rope_scaling == "llama3":
            d["rope_scaling"] |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=round(c.trained_length))
    d |= dict(model_type=family, architectures=[{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
              torch_dtype=str(dtype)[6:], bos_token_id=begin, eos_token_id=end)
    state, out = model.state_dict(), {}
    for theirs, (parts, turned) in hf_tensors(c, family).items():
        for ours, p in parts.items():
            source = ours if c.mlp == "swiglu" else ours.replace("c_gate", "c_fc")
            parts[ours] = state[source] if source in state else torch.full(p.shape, float("weight" in ours))
        out[theirs] = join(parts.values(), turned).to("cpu", dtype)
    st.torch.save_file(out, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    for name, what in (("config.json", d), ("generation_config.json", dict(bos_token_id=begin, eos_token_id=end))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f: json.dump(what, f, indent=1)
    return family

# ---------------------------------------------------------------------------- devices and checkpoints

def pick_device(name, local_rank=0):
    """torch.device of the knob `device`; auto prefers CUDA, then MPS; plain cuda is this rank's GPU. ValueError for what is not there."""
    if name == "auto": name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try: device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError: raise ValueError(f"device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: use --device=auto")
    return device


def save_checkpoint(path, checkpoint):
    """torch.save that leaves the old file or the new one, never half a file: temporary name, fsync, rename. OSError says what to do."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:        # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError): os.unlink(temporary)
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]}): free space or choose another --out_dir; the last one saved stands") from None


def load_checkpoint(path):
    """The dict that train.py saved (tensors and primitives), on the CPU. ValueError where there is none or it is damaged."""
    if not os.path.isfile(path): raise ValueError(f"no checkpoint at {path}: train one first, e.g. python train.py config/stdlib.py")
    try: checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        other = "ckpt.pt" if os.path.basename(path) == "best.pt" else "best.pt"
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(e).__name__}): copy {other} of its folder over it, or train again") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint: raise ValueError(f"{path} is not a checkpoint of train.py")
    return checkpoint
