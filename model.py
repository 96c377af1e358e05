"""
A GPT in one file: a modern one by default, exactly GPT-2 with other settings of the same config. Plus the KV cache for sampling.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    _, loss = model(idx, targets)                        # training: a fused loss, so there are no logits
    logits, _ = model(idx, cache=KVCache(...))           # inference: idx holds only the new tokens
    model = GPT.load("out/stdlib/ckpt.pt")               # or a Hugging Face folder

    pre-norm residual blocks, GPT-2's init          Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    RoPE, rotary positions                          Su et al. 2021, arXiv:2104.09864
    grouped queries (GQA), one kv head (MQA)        Ainslie et al. 2023, arXiv:2305.13245; Shazeer 2019, arXiv:1911.02150
    RMSNorm                                         Zhang and Sennrich 2019, arXiv:1910.07467
    SwiGLU; ReLU^2                                  Shazeer 2020, arXiv:2002.05202; So et al. 2021, arXiv:2109.08668
    QK-norm                                         Henry et al. 2020, arXiv:2010.04245
    short windows in lower layers                   Beltagy et al. 2020 (Longformer), arXiv:2004.05150
    logit soft-cap                                  Gemma 2, arXiv:2408.00118
    LoRA, fine-tuning at low rank                   Hu et al. 2021, arXiv:2106.09685
    Muon for hidden matrices                        Jordan et al. 2024, kellerjordan.github.io/posts/muon

Notation: B batch, T new tokens, S keys (cached and new), H query heads, K kv heads, D head dim, C = n_embd (H*D unless
head_size says otherwise), V vocab_size, N = B*T.
"""
import contextlib, json, math, os, re, shutil, sys, textwrap, zipfile
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flash_attn
from config import GPTConfig

# ---------------------------------------------------------------------------- positions

def position_table(config):
    """cos and sin of every position's angles, (2, block_size, D/2): pair d has the angle position / theta^(2d/D). Sinusoidal
    positions (Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5) use the same table with D = n_embd. RoPE scaling
    stretches a model from the block_size / s it was trained at to block_size, s = rope_factor. linear (arXiv:2306.15595) divides
    all frequencies by s. ntk (bloc97 2023) raises theta, so that only the lowest frequency is divided by all of s. For yarn
    (arXiv:2309.00071) and llama3 (Llama 3.1's code), a pair's turns in the trained length decide: below one, its frequency is
    divided by s; many, it stays; between, a mixture linear in turns (transformers' yarn: in d). yarn also sharpens attention."""
    s, scaling = config.rope_factor, config.rope_scaling
    D = dict(rope=config.head_dim, sinusoidal=config.n_embd)[config.pos]
    theta = config.rope_theta * (s ** (D / max(D - 2, 1)) if scaling == "ntk" else 1)
    f64 = dict(dtype=torch.float64, device="cpu")       # the CPU: even a model built on the meta device needs a real table
    frequency = theta ** -(torch.arange(0, D, 2, **f64) / D)
    if scaling == "linear": frequency /= s
    elif scaling in ("yarn", "llama3"):
        turns, many = config.trained_length * frequency / (2 * math.pi), 32 if scaling == "yarn" else 4
        keep = ((turns - 1) / (many - 1)).clamp(0, 1)
        frequency *= keep + (1 - keep) / s
    angle = torch.outer(torch.arange(config.block_size, **f64), frequency)
    sharpen = 0.1 * math.log(s) + 1 if scaling == "yarn" else 1.0
    return (sharpen * torch.stack((angle.cos(), angle.sin()))).float()

def stretched(config, scaling, factor):
    """config with a context of `factor` times the trained length by RoPE scaling, see position_table."""
    length = config.trained_length
    return replace(config, rope_scaling=scaling, rope_factor=factor, rope_trained=round(length), block_size=int(length * factor))

def apply_rope(x, cos, sin):
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, T, H, D), the complex product (x1 + i x2)(cos + i sin), so that q.k depends
    only on the distance. cos, sin: (T, 1, D/2), or (B, T, 1, D/2) if rows are at different positions. subtle: Llama's published
    code pairs (x[2d], x[2d+1]); pairing the two halves, as Hugging Face does, is the same up to a permutation of dimensions."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

# ---------------------------------------------------------------------------- attention and its cache

class KVCache:
    """Keys and values, allocated once: k[layer] and v[layer] are (B, K, max_len, D). Row b holds lengths[b] valid positions, so
    prompts of different lengths can share a batch: feed them right-padded, then call `set_lengths(true lengths)`. What lies
    beyond a row's length is masked out and later overwritten. Memory: 2 * n_layer * B * K * max_len * D * bytes per element.
    If `static`, every step attends over max_len positions: compiled steps and CUDA graphs need one constant shape. subtle: each
    layer has its own tensor, which a compiled step updates in place; one tensor for all would be copied whole in every layer."""
    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (batch_size, config.kv_heads, max_len, config.head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2))
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.max_len, self.static = max_len, False      # static: set it before set_lengths; the caller then checks for room
        self.span, self.ragged = 0, False           # span: S, how many keys are attended over; ragged: rows differ in length

    def set_lengths(self, lengths):
        """lengths: one int per row. Everything beyond them is forgotten; all zeros empties the cache."""
        assert len(lengths) == len(self.lengths) and max(lengths) <= self.max_len
        self.span = self.max_len if self.static else max(lengths)       # static: a compiled step needs a constant span
        self.ragged = self.static or min(lengths) != max(lengths)
        self.lengths.copy_(torch.as_tensor(lengths, dtype=torch.int32), non_blocking=self.lengths.is_cuda)

    def reorder(self, rows):
        """Row b becomes a copy of the former row rows[b], as for beams; rows may be repeated or left out."""
        rows = torch.as_tensor(rows, device=self.lengths.device)
        self.k, self.v, self.lengths = [k[rows] for k in self.k], [v[rows] for v in self.v], self.lengths[rows]

    def grow(self, T):
        """Reserve T new positions per row -> (pos, S): their numbers, (T,), or (B, T) if rows differ in length, and the span."""
        if not self.static and self.span + T > self.max_len:
            raise ValueError(f"the cache holds {self.span} of {self.max_len} tokens: no room for {T} more")
        pos = torch.arange(T, device=self.lengths.device) + (self.lengths[:, None] if self.ragged else self.span)
        self.lengths += T
        if not self.static: self.span += T
        return pos, self.span

    def update(self, layer, pos, k, v):
        """Write one layer's new k, v (B, K, T, D) at pos; return the keys and values to attend over, (B, K, S, D) each."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.ragged:     # subtle: index tensors on both sides of a slice select (B, T, K, D)
                store[torch.arange(len(new), device=new.device)[:, None], :, pos] = new.transpose(1, 2).to(store.dtype)
            else:
                store[:, :, self.span - new.shape[2]:self.span] = new
        return self.k[layer][:, :, :self.span], self.v[layer][:, :, :self.span]

def sdpa_mask(pos, S, window=0, doc_start=None):
    """(T, S) or (B, 1, T, S), True where the query at pos, (T,) or (B, T), may see key j of S: j <= pos, j > pos - window if
    window > 0, and j >= doc_start (B, T) if given. None if SDPA needs no mask: T == S, which is_causal handles, or a single
    query, which sees all keys."""
    j, p = torch.arange(S, device=pos.device), pos[..., None]
    if pos.dim() == 1 and len(pos) in (1, S) and doc_start is None and not 0 < window < S: return None
    seen = j <= p
    if window: seen = seen & (j > p - window)
    if doc_start is not None: seen = seen & (j >= doc_start[..., None])
    return seen[:, None] if seen.dim() == 3 else seen

def whole_attention(q, k, v, mask, dropout_p):
    """SDPA by the whole matrix of scores, for training on a CPU, where torch's own backward pass is slow in bfloat16. 8 rows of 4
    heads of 64, forward and backward: 9 ms instead of 23 for 256 tokens, 3 instead of 11 for 128; for 1,024 it is slower."""
    T, S, K = q.shape[2], k.shape[2], k.shape[1]
    if mask is None: mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)       # (T, S) or (B, 1, T, S)
    scores = (q / math.sqrt(q.shape[3])).unflatten(1, (K, -1)) @ k[:, :, None].mT                       # (B, K, H/K, T, S)
    p = F.dropout((scores.flatten(1, 2) + bias).softmax(-1), dropout_p).unflatten(1, (K, -1))
    return (p @ v[:, :, None]).flatten(1, 2)

def attention(q, k, v, backend="sdpa", cache=None, window=0, mask=None, dropout_p=0.0):
    """Causal attention of q (B, H, T, D) over k, v (B, K, S, D), the only place where the backend matters. mask: for sdpa, the
    whole mask from sdpa_mask; for flash_attn, only doc_start: it handles causality, window and the rows' lengths itself."""
    T, S = q.shape[2], k.shape[2]
    if backend == "flash_attn":
        if cache is None or T == S and not cache.ragged: return flash_attn.flash_attention(q, k, v, window=window, doc_start=mask)
        return flash_attn.flash_decode(q, k, v, cache.lengths, window)
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and S <= 512:
        return whole_attention(q, k, v, mask, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None and T > 1,
                                          enable_gqa=q.shape[1] != k.shape[1])

# ---------------------------------------------------------------------------- the blocks

class RMSNorm(nn.RMSNorm):
    """torch's, with the gain cast to x's dtype: under autocast the two differ, and torch would not use its fused kernel."""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.to(x.dtype), self.eps)

def norm(config, width, kind="rmsnorm"):
    """LayerNorm always has a gain, RMSNorm only with norm_gain: the matrix after it can learn the same (QK-norm has none)."""
    if kind == "layernorm": return nn.LayerNorm(width, config.norm_eps, bias=config.bias)
    return RMSNorm(width, config.norm_eps, elementwise_affine=config.norm_gain)

class LoRALinear(nn.Linear):
    """A frozen linear layer plus a learned low-rank B A: y = x W^T + x A^T B^T. A (rank, in) starts Gaussian and B (out, rank)
    zero, so at first nothing changes. Hu et al. 2021, arXiv:2106.09685; their factor alpha / rank is 1 here, because it only
    rescales the learning rate (section 4.1). `adapt` changes a layer's class in place, so names in the state dict stay."""
    @classmethod
    def adapt(cls, linear, rank):
        out, width = linear.weight.shape
        linear.__class__ = cls
        linear.lora_a = nn.Parameter(torch.randn(rank, width, device=linear.weight.device) / math.sqrt(width))
        linear.lora_b = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        C, HD, KD = config.n_embd, config.n_head * config.head_dim, config.kv_heads * config.head_dim
        self.c_q = nn.Linear(C, HD, bias=config.bias)   # three matrices, not one: Muon orthogonalises each separately
        self.c_k = nn.Linear(C, KD, bias=config.bias)
        self.c_v = nn.Linear(C, KD, bias=config.bias)
        self.c_proj = nn.Linear(HD, C, bias=config.bias)
        if config.qk_norm: self.q_norm, self.k_norm = norm(config, config.head_dim), norm(config, config.head_dim)

    def qkv(self, x, rope):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), with q and k normalised and rotated."""
        heads = -1, self.config.head_dim
        q, k, v = (linear(x).unflatten(-1, heads) for linear in (self.c_q, self.c_k, self.c_v))     # (B, T, H or K, D)
        if self.config.qk_norm: q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None: q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        # transposed only here: while q and k lie in memory as x does, the compiler joins norm and RoPE of both in one kernel, and
        # their backward in another. type_as: under autocast, the float32 RoPE table has promoted q and k
        return q.type_as(v).transpose(1, 2), k.type_as(v).transpose(1, 2), v.transpose(1, 2)

    # rope: (cos, sin) or None; pos: (T,) or (B, T), where the cache takes the new keys; masks: {window: mask}. See GPT.hidden
    def forward(self, x, rope, cache, pos, backend, masks):
        q, k, v = self.qkv(x, rope)
        if cache is not None: k, v = cache.update(self.layer, pos, k, v)       # (B, K, S, D)
        y = attention(q, k, v, backend, cache, self.window, masks[self.window], self.config.dropout * self.training)
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
        self.ln_1, self.attn = norm(config, config.n_embd, config.norm), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = norm(config, config.n_embd, config.norm), MLP(config)

    def forward(self, x, rope, cache, pos, backend, masks):
        x = x + self.attn(self.ln_1(x), rope, cache, pos, backend, masks)
        return x + self.mlp(self.ln_2(x))

# ---------------------------------------------------------------------------- the loss

class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(cap * tanh(x W^T / cap)) against targets, without the (N, V) logits: `rows` of them exist at
    a time, and the forward pass turns their gradient, softmax - onehot, into dx and dW, which the backward pass only scales.
    x (N, C), W (V, C), targets (N) with -1 = ignore, cap 0 = none. As in Liger Kernel, arXiv:2410.10989. For 2048 x 768 x
    50304 on two CPU cores in bfloat16: 2.2 s; torch 2.13's F.linear_cross_entropy: 2.0 s with whole logits, 8.7 s in chunks.
    W may have more than V rows, a padding: on an H100 one of the products takes 11.4 ms with 50,257 rows, 6.4 with 50,304."""
    @staticmethod
    def forward(ctx, x, weight, targets, V, cap, rows=None):
        rows, device = rows or (4096 if x.is_cuda else 512), x.device.type      # on a CPU, few enough to stay in its cache
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        train_x, train_head = ctx.needs_input_grad[:2]
        counts = (targets >= 0).float()                                         # (N), 0 where ignored
        x, w = x.to(dtype), weight.to(dtype)
        loss, dx, dw = torch.zeros((), device=x.device), torch.empty_like(x), torch.zeros_like(weight) if train_head else None
        compiled = torch.compiler.is_compiling()    # then targets by ==, fused: gather and scatter would store float32 logits
        with torch.autocast(device, enabled=False):
            for i in range(0, len(x), rows):
                part, keep = x[i:i + rows], counts[i:i + rows, None]            # (rows, C), (rows, 1)
                t = targets[i:i + rows, None].clamp(min=0)                      # (rows, 1)
                logits = (part @ w.T).float()                                   # (rows, V)
                if cap:
                    logits.div_(cap).tanh_()
                    slope = 1 - logits.square()                                 # tanh' = 1 - tanh^2
                    logits *= cap
                if len(w) > V: logits[:, V:] = -torch.inf       # padding: a mean over columns (label smoothing) must skip it
                logits = logits.log_softmax(-1)                                 # same name, so that the old tensor is freed
                hit = torch.arange(len(w), device=x.device) == t if compiled else None              # (rows, V)
                log_p = logits.where(hit, 0).sum(1, True) if compiled else logits.gather(1, t)      # of the targets, (rows, 1)
                loss = loss - (keep * log_p).sum()      # subtle: not in place: torch 2.11's compiler would zero all gradients
                if not (train_x or train_head): continue
                g = (logits.exp() - hit.float()) * keep if compiled else logits.exp_().mul_(keep).scatter_add_(1, t, -keep)
                if cap: g *= slope
                g = g.to(dtype)
                dx[i:i + rows] = g @ w
                if train_head: dw += g.T @ part
        n = counts.sum().clamp(min=1)
        ctx.save_for_backward(dx, dw, n)        # gradients of the sum: the mean's would underflow in float16 before loss scaling
        return loss / n

    @staticmethod
    def backward(ctx, scale):
        assert torch.compiler.is_compiling() or not torch.is_grad_enabled(), "no second derivative: use F.cross_entropy(logits)"
        dx, dw, n = ctx.saved_tensors
        return dx * (scale / n), None if dw is None else dw * (scale / n), None, None, None, None

# ---------------------------------------------------------------------------- the optimizer

class AsFloat32(torch.overrides.TorchFunctionMode):
    """Inside this context, `x.bfloat16()` gives float32."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (torch.Tensor.float if function is torch.Tensor.bfloat16 else function)(*args, **(kwargs or {}))

class Float32Muon(torch.optim.Muon):
    """Muon for devices that only emulate bfloat16, which torch's Muon uses on every device. For eight 1024 x 256 matrices
    on one core with AVX2, a step takes 140 ms instead of 5,257. subtle: float() returns a float32 tensor itself, which Muon then
    divides in place; with nesterov=True, the default, that is a temporary tensor, else it would be the momentum."""
    def step(self, closure=None):
        with AsFloat32(): return super().step(closure)

# ---------------------------------------------------------------------------- the model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=norm(config, config.n_embd, config.norm)))
        if config.pos == "learned": self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        else: self.register_buffer("table", position_table(config), persistent=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights: self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            residual = name.endswith("c_proj.weight")   # writes to the residual stream: zero, or scaled by GPT-2's 1/sqrt(2L)
            if p.dim() > 1: nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            if name.endswith("bias") or config.zero_init and (residual or p is self.lm_head.weight): nn.init.zeros_(p)
        self.backend, self.grad_checkpoint = None, False        # backend: the first call chooses, see set_backend
        self.eot = None     # for doc_mask, the end-of-text id: a token sees nothing before the latest one (not with a cache)

    def set_backend(self, training=True):
        """Use the kernels of flash_attn.py if they run on the weights' device, else SDPA; return a line that says which."""
        device, why_not = self.transformer.wte.weight.device, "no CUDA device, which the Triton kernels need"
        if device.type == "cuda":
            q = torch.empty(1, 1, 1, self.config.head_dim, device=device, dtype=torch.bfloat16)
            why_not = flash_attn.why_not(q, q, q, dropout_p=self.config.dropout if training else 0.0)
        self.backend = "sdpa" if why_not else "flash_attn"
        return f"torch SDPA ({why_not})" if why_not else "flash_attn.py, Triton kernels"

    def add_lora(self, rank):
        """Freeze every weight and learn low-rank updates of the attention's matrices instead; from_checkpoint merges them."""
        self.requires_grad_(False)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.attn.c_proj): LoRALinear.adapt(linear, rank)

    def stretch(self, scaling, factor):
        """Extend the context to `factor` times the trained length by RoPE scaling alone, no training."""
        self.config = stretched(self.config, scaling, factor)
        self.table = position_table(self.config).to(self.table.device)

    def forward(self, idx, targets=None, cache=None, by_row=False):
        """idx (B, T) -> (logits (B, T, V), None). With targets (B, T; -1 = ignore) -> (None, mean loss in nats per token), or
        by_row the log-probability of each row's targets (B,). With a cache, idx continues the tokens in it and is added."""
        x = self.hidden(idx, cache)
        if targets is None: return self.head(x), None
        if by_row: return None, self.log_probs(x, targets)
        # subtle: detached, or the loss would compute dW even in evaluation, just because the weight requires a gradient
        V, weight = self.config.vocab_size, self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        if weight.is_cuda and V % 64: weight = F.pad(weight, (0, 0, 0, -V % 64))        # see LinearCrossEntropy
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), V, self.config.logit_softcap)

    def hidden(self, idx, cache=None):
        """idx (B, T) -> the input of the head, (B, T, C). If you need the logits of few positions, call head on just those."""
        if self.backend is None: self.set_backend(self.training)
        T, flash = idx.shape[1], self.backend == "flash_attn"
        past = cache.span if cache is not None and not cache.static else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size={self.config.block_size}: shorten the text")
        assert cache is None or len(cache.lengths) == len(idx), f"a cache for {len(cache.lengths)} rows, but {len(idx)} are given"
        pos, S = cache.grow(T) if cache is not None else (torch.arange(T, device=idx.device), T)        # pos (T,) or (B, T)
        x, rope, doc_start = self.transformer.wte(idx), None, None                              # x (B, T, C)
        if self.config.pos == "learned": x = x + self.transformer.wpe(pos)
        elif self.config.pos == "rope": rope = self.table[:, pos].unsqueeze(-2).unbind()        # (T, 1, D/2) or (B, T, 1, D/2)
        elif self.config.pos == "sinusoidal":       # sines in even columns, cosines in odd ones; sqrt(C) brings x to their size
            x = x * math.sqrt(self.config.n_embd) + self.table[:, pos].flip(0).movedim(0, -1).flatten(-2).type_as(x)
        x = F.dropout(x, self.config.dropout, self.training)
        device = x.device.type      # the stream in bfloat16, too: half the bytes for norms and sums, saves 5% of a step on a CPU
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16: x = x.bfloat16()
        if self.eot is not None and cache is None:
            doc_start = torch.where(idx == self.eot, pos, 0).cummax(1).values                   # (B, T)
        masks = {w: doc_start if flash else sdpa_mask(pos, S, w, doc_start) for w in set(self.config.windows)}  # one per window
        recompute = self.grad_checkpoint and self.training and cache is None
        for block in self.transformer.h:
            args = x, rope, cache, pos, self.backend, masks
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        return self.transformer.ln_f(x)

    def head(self, x):
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def log_probs(self, x, targets):
        """x (B, T, C) from `hidden`, targets (B, T; -1 = ignore) -> the log-probability of each row's targets (B,), in nats."""
        keep = targets >= 0
        nats = F.cross_entropy(self.head(x[keep]).float(), targets[keep], reduction="none")
        return -nats.new_zeros(targets.shape).masked_scatter(keep, nats).sum(1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self):
        """Training FLOPs per token, forward and backward: 6 per weight that multiplies an activation (so not for embedding
        look-ups), 4 if it is frozen, plus 12*H*D*T per layer for the attention matrix (with its window for T), not halved for
        causality; PaLM, arXiv:2204.02311, appendix B."""
        c, layers = self.config, (m for m in self.modules() if not isinstance(m, nn.Embedding))     # a tied weight: once
        flops = sum(p.numel() * (6 if p.requires_grad else 4) for m in layers for p in m.parameters(recurse=False))
        return flops + 12 * c.n_head * c.head_dim * sum(min(window or c.block_size, c.block_size) for window in c.windows)

    def configure_optimizers(self, cfg):
        """cfg: a config.Config -> list of optimizers, with each trained parameter in exactly one group. adamw: weight decay on
        matrices, not on gains and biases (as in GPT-1, Radford et al. 2018). muon: torch's Muon for the blocks' matrices, AdamW
        for the rest. Muon steps along U V^T, where U S V^T is the matrix's momentum (nearly: by five Newton-Schulz iterations),
        so a step moves all its directions alike, by matrix_lr, times sqrt(rows / columns) if that is above 1. The embedding, of
        which a step changes few rows, has a higher rate than the head or learned positions, of which it changes all. With LoRA,
        only its own matrices are trained, by AdamW."""
        def make(kind, groups, **kw):
            if not cfg.shard_optimizer: return kind(groups, **kw)
            from torch.distributed.optim import ZeroRedundancyOptimizer     # here: importing it takes a second
            return ZeroRedundancyOptimizer(groups, kind, **kw)
        matrices, embedding, head, rest = [], [], [], []
        for name, p in self.named_parameters():
            looked_up = name == "transformer.wte.weight" and not self.config.tie_weights    # tied, it steps as the head
            group = rest if p.dim() < 2 else matrices if ".h." in name else embedding if looked_up else head
            if p.requires_grad: group.append(p)
        muon = dict(muon=len(head) > 0, adamw=False)[cfg.optimizer]     # with LoRA, no head is trained
        if muon: groups = [dict(params=embedding, lr=cfg.embedding_lr), dict(params=head, lr=cfg.unembedding_lr)]
        else: groups = [dict(params=matrices + head + embedding, weight_decay=cfg.weight_decay)]
        adamw = make(torch.optim.AdamW, [g for g in (*groups, dict(params=rest)) if g["params"]], lr=cfg.learning_rate,
                     weight_decay=0.0, betas=(cfg.beta1, cfg.beta2), eps=1e-10 if muon else 1e-8,
                     fused=self.lm_head.weight.device.type in ("cuda", "cpu"))
        if not muon: return [adamw]
        kind = torch.optim.Muon if has_bfloat16(self.lm_head.weight.device) else Float32Muon
        return [adamw, make(kind, matrices, lr=cfg.matrix_lr, momentum=0.95, weight_decay=cfg.weight_decay)]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """Continue idx (B, T) to (B, T + max_new_tokens); temperature 0 is argmax. When the context is full, its newer half is
        fed again into an empty cache, so the length has no limit. sample.py has all other sampling options."""
        weight, size = self.lm_head.weight, self.config.block_size
        if temperature < 0 or (top_k or 0) < 0:
            raise ValueError(f"temperature={temperature} (0 is argmax) and top_k={top_k} (0 keeps all) must not be negative")
        if not idx.shape[1]: raise ValueError("nothing to continue: begin with an end-of-text token, or a line end")
        idx = new = idx.to(weight.device)
        cache = KVCache(self.config, len(idx), min(size, idx.shape[1] + max_new_tokens), weight.device, weight.dtype)
        for _ in range(max_new_tokens):
            if cache.span + new.shape[1] > size:
                cache.set_lengths([0] * len(idx))
                new = idx[:, -max(size // 2, 1):]
            logits = self.head(self.hidden(new, cache)[:, -1])
            if temperature == 0: new = logits.argmax(-1, keepdim=True)
            else: new = torch.multinomial(filter_logits(logits, temperature, top_k).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a checkpoint file (with LoRA merged), a run's folder or a Hugging Face folder, in evaluation mode."""
        path = next(filter(os.path.isfile, (os.path.join(path, name) for name in ("best.pt", "ckpt.pt"))), path)
        return load_hf(path, device) if os.path.isdir(path) else cls.from_checkpoint(load_checkpoint(path), path).to(device)

    @classmethod
    def from_checkpoint(cls, checkpoint, path="checkpoint"):
        try:
            model = cls(GPTConfig(**{k: v for k, v in checkpoint["config"].items() if hasattr(GPTConfig, k)}))
            state = dict(checkpoint["model"])
            for layer in [key.removesuffix(".lora_a") for key in state if key.endswith(".lora_a")]:     # becomes W + B A
                state[f"{layer}.weight"] = state[f"{layer}.weight"] + state.pop(f"{layer}.lora_b") @ state.pop(f"{layer}.lora_a")
            model.load_state_dict(state)
        except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as e:
            what = textwrap.shorten(str(e).splitlines()[-1], 240)       # load_state_dict has a line for each tensor
            raise ValueError(f"{path}: not a checkpoint of this project's model: {what}") from None
        return model.eval()

def filter_logits(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """logits (B, V) -> logits / temperature, with -inf for tokens that must not be drawn: all but the top_k likeliest, all but
    the likeliest that add up to top_p (Holtzman et al. 2020, arXiv:1904.09751), and those less than min_p times as likely as the
    likeliest (arXiv:2407.01082). subtle: top_p is a share of what top_k keeps; sample.py's draw cuts that out before, top_k=0."""
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p            # a token stays if the likelier ones do not reach top_p: the first always does
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits

# ---------------------------------------------------------------------------- Hugging Face folders, in and out

# One table per transformers architecture, for reading, writing and refusing models. kind: its class; shape: GPTConfig fields that
# all its models share; keys: {its key in config.json: our field}; names: {part of our parameter names: theirs}, replaced in order
GPT2 = dict(
    kind="GPT2LMHeadModel", shape=dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False, tie_weights=True),
    keys=dict(n_positions="block_size", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
              n_inner="n_inner", layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_weights"),
    names=dict(c_q="c_attn", c_k="c_attn", c_v="c_attn"))
QWEN3 = dict(
    kind="Qwen3ForCausalLM", shape=dict(pos="rope", norm="rmsnorm", norm_gain=True, mlp="swiglu", qk_norm=True),
    keys=dict(max_position_embeddings="block_size", vocab_size="vocab_size", num_hidden_layers="n_layer", hidden_size="n_embd",
              num_attention_heads="n_head", num_key_value_heads="n_kv_head", head_dim="head_size", intermediate_size="n_inner",
              rms_norm_eps="norm_eps", tie_word_embeddings="tie_weights", rope_theta="rope_theta"),
    names={"transformer.h": "model.layers", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
           "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "attn.o_proj", "attn.": "self_attn.",
           "c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_fc": "up_proj", "c_gate": "gate_proj", "c_proj": "down_proj"})
LLAMA = QWEN3 | dict(kind="LlamaForCausalLM", shape=QWEN3["shape"] | dict(qk_norm=False),
                     keys=QWEN3["keys"] | dict(attention_bias="bias", mlp_bias="bias"))
FAMILIES = dict(gpt2=GPT2, llama=LLAMA, qwen3=QWEN3)
OPTIONAL = ("n_inner", "n_kv_head", "head_size", "bias", "rope_theta", "tie_weights")       # if absent, our default applies
# other keys of a config.json, each with the values that can be read here; a missing key is fine, too
ALLOWED = dict(model_type=tuple(FAMILIES), activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
               add_cross_attention=(False,), scale_attn_by_inverse_layer_idx=(False,), hidden_act=("silu", "relu"),
               rope_type=("default", "linear", "llama3"), low_freq_factor=(1,),
               high_freq_factor=(4,), partial_rotary_factor=(1,), quantization_config=())

def safetensors():
    try: import safetensors, safetensors.torch
    except ImportError: raise ValueError("Hugging Face folders need safetensors: pip install safetensors") from None
    return safetensors

def hf_shape(hf):
    """The contents of a config.json by transformers 4 or 5 -> the same, flat and without nulls, and our GPTConfig. ValueError
    lists all that is unsupported."""
    if "model_type" not in hf: raise KeyError("model_type")         # such as the config.json of a run of ours
    hf = hf | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})       # transformers 4 and 5 nest RoPE's settings here
    hf = {key: value for key, value in hf.items() if value is not None}
    scaling = hf.setdefault("rope_type", hf.get("type", "default"))
    wrong = [f"{key}={hf[key]!r}" + (f", not in {allowed}" if allowed else "")
             for key, allowed in ALLOWED.items() if key in hf and hf[key] not in allowed]
    kinds = hf.get("layer_types", ["sliding_attention"] * bool(hf.get("use_sliding_window")))       # windows but no list: refused
    pattern = "".join(dict(full_attention="L", sliding_attention="S").get(kind, "?") for kind in kinds)
    fits = not pattern or len(pattern) == hf.get("num_hidden_layers") and ("S" not in pattern or hf.get("use_sliding_window"))
    if not fits or not re.fullmatch("([LS]*L)?" if hf["model_type"] == "qwen3" else "L*", pattern):
        wrong.append(f"layer_types={kinds}")
    if wrong: raise ValueError(f"it has settings that are not supported here: {', '.join(wrong)}")
    family = FAMILIES[hf["model_type"]]
    shape = family["shape"] | {field: hf[key] for key, field in family["keys"].items() if key in hf or field not in OPTIONAL}
    if scaling != "default" and hf["factor"] != 1:
        trained = hf.get("original_max_position_embeddings", shape["block_size"])
        shape |= dict(rope_scaling=scaling, rope_factor=float(hf["factor"]), rope_trained=trained)
    if "S" in pattern: shape |= dict(window_pattern=pattern, window=hf["sliding_window"])
    if hf.get("attention_bias") or hf.get("mlp_bias"): shape["bias"] = True     # if only one of the two, load_hf adds zeros
    if hf.get("hidden_act") == "relu": shape["mlp"] = "relu2"           # if gate_proj equals up_proj: load_hf checks that
    return hf, GPTConfig(**shape, zero_init=False)

def hf_config(folder):
    """hf_shape of a folder's config.json; ValueError names the file and what is wrong with it."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f: return hf_shape(json.load(f))
    except FileNotFoundError: raise ValueError(f"{path} is missing: a Hugging Face folder needs it and safetensors") from None
    except KeyError as e: raise ValueError(f"{path} has no entry {e}") from None
    except (ValueError, TypeError, AttributeError) as e: raise ValueError(f"cannot read {path}: {e}") from None

def hf_places(hf, config):
    """For what hf_shape returns: {their name: (our names, shape, transposed)}. Their tensor is ours, each of that shape, joined
    along dim 0, and then transposed where GPT-2 has a Conv1D. ReLU^2 is relu(gate) * up with gate and up both our c_fc. Llama may
    have biases in attention or MLP alone, Qwen3 only in attention; we have them in both."""
    family, places = FAMILIES[hf["model_type"]], {}
    with torch.device("meta"): model = GPT(replace(config, mlp=family["shape"]["mlp"], n_inner=config.inner))
    for ours, p in model.named_parameters():
        theirs, transposed = ours, family is GPT2 and ".h." in ours and p.dim() == 2
        for old, new in family["names"].items(): theirs = theirs.replace(old, new)
        biased = hf.get("mlp_bias" if ".mlp." in theirs else "attention_bias", family is GPT2)
        if theirs.endswith(".bias") and not biased: continue
        if config.mlp == "relu2": ours = ours.replace("c_gate", "c_fc")
        places.setdefault(theirs, ([], p.shape, transposed))[0].append(ours)
    return places

def hf_tensors(folder):
    """Yield (path, name, tensor) for all tensors in the folder's safetensors. ValueError if files are missing or damaged."""
    st, paths = safetensors(), [os.path.join(folder, "model.safetensors")]
    if not os.path.isfile(paths[0]) and os.path.isfile(index := paths[0] + ".index.json"):
        try:
            with open(index, encoding="utf-8") as f: names = sorted({*json.load(f)["weight_map"].values()})
            paths = [os.path.join(folder, os.path.basename(name)) for name in names]
        except (ValueError, LookupError, TypeError, AttributeError) as e: raise ValueError(f"cannot read {index}: {e}") from None
    if absent := [path for path in paths if not os.path.isfile(path)]: raise ValueError(f"{absent[0]} is missing: download it")
    for path in paths:
        try:
            with st.safe_open(path, "pt") as f: keys = list(f.keys())
            for key in keys:        # subtle: reopen for each one: pages read count as our memory until the file is closed
                with st.safe_open(path, "pt") as f: yield path, key, f.get_tensor(key)
        except (st.SafetensorError, OSError) as e: raise ValueError(f"{path} is damaged ({e}): download it again") from None

def load_hf(folder, device="cpu", dtype=torch.float32, config=None):
    """The GPT in a Hugging Face folder, in evaluation mode. config: that of hf_config, perhaps with another block_size, RoPE
    scaling or dropout. Tensors are read one by one: memory holds the model and at most two of the file's matrices."""
    hf, found = hf_config(folder)
    config, places, state = config or found, hf_places(hf, found), {}
    missing = set(places)
    if found.tie_weights:       # some files store the head, too
        places["lm_head.weight"] = ["transformer.wte.weight"], (found.vocab_size, found.n_embd), False
    for path, key, whole in hf_tensors(folder):
        name = "transformer." + key if "transformer." + key in places else key      # GPT-2's own file omits the prefix
        if re.search(r"\.attn\.(masked_)?bias$|inv_freq$", key): continue           # masks and tables that old files store
        if name not in places: raise ValueError(f"{path} has {key}, which is no part of the model in config.json")
        if not whole.is_floating_point() or whole.element_size() < 2:
            raise ValueError(f"{path}: {key} is quantised ({whole.dtype}): use a version in float32, bfloat16 or float16")
        parts, (rows, *width), transposed = places[name]
        if transposed: whole = whole.T
        shape = [len(parts) * rows, *width]
        if list(whole.shape) != shape:
            raise ValueError(f"{path}: {key} has the shape {list(whole.shape)}, but config.json asks for {shape}")
        missing.discard(name)
        for ours, t in zip(parts, whole.chunk(len(parts))):
            if ours == "transformer.wpe.weight": t = t[:config.block_size]
            t = torch.empty(t.shape, dtype=dtype, device=device).copy_(t)
            if not torch.equal(state.setdefault(ours, t), t):       # read twice: a tied head, or the gate and up of ReLU^2
                raise ValueError(f"{path}: {key} differs from its twin: tied weights must be equal, so must relu's gate and up")
    if missing: raise ValueError(f"{folder} lacks {len(missing)} tensors, such as {min(missing)}: are all its files there?")
    with torch.device("meta"): model = GPT(config)
    for ours, p in model.named_parameters():        # biases that theirs does not have
        if ours not in state: state[ours] = torch.zeros(p.shape, dtype=dtype, device=device)
    model.load_state_dict(state, assign=True, strict=False)
    if config.tie_weights: model.lm_head.weight = model.transformer.wte.weight      # assign=True has replaced wte
    return model.to(device).eval()

def save_hf(model, folder, dtype=torch.float32, begin=None, end=None):
    """Write config.json and model.safetensors as GPT-2, Llama or Qwen3, whichever fits the model, and return its name. begin,
    end: ids of the tokens that begin and end a text. What only theirs has is filled in: zeros for biases, ones for gains.
    ValueError if hf_shape would not read back the same model."""
    def explicit(c): return replace(c, n_kv_head=c.kv_heads, head_size=c.head_dim, n_inner=c.inner, window=max(c.windows),
                                    window_pattern="".join("LS"[window > 0] for window in c.windows))
    c, st, state, tensors = explicit(model.config), safetensors(), model.state_dict(), {}       # explicit: no 0 = default
    name = "gpt2" if c.pos == "learned" else "qwen3" if c.qk_norm else "llama"
    family = FAMILIES[name]
    hf = {key: getattr(c, field) for key, field in family["keys"].items()} | dict(
        model_type=name, architectures=[family["kind"]], torch_dtype=str(dtype).removeprefix("torch."),
        bos_token_id=begin, eos_token_id=end)
    if name == "gpt2": hf |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    else: hf["hidden_act"] = "relu" if c.mlp == "relu2" else "silu"
    if c.window: hf |= dict(use_sliding_window=True, sliding_window=c.window, layer_types=[
        "sliding_attention" if window else "full_attention" for window in c.windows])
    if c.rope_scaling in ("linear", "llama3"): hf["rope_scaling"] = dict(rope_type=c.rope_scaling, factor=c.rope_factor)
    llama3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=round(c.trained_length))
    if c.rope_scaling == "llama3": hf["rope_scaling"] |= llama3
    try: back = explicit(hf_shape(hf)[1])
    except ValueError as e: raise ValueError(f"cannot export: transformers' {name} cannot have this shape ({e})") from None
    # what may differ: what does not change the outputs (rope_trained: llama3's is checked below), and what is filled in
    may_differ = ["dropout", "zero_init", "rope_theta", "rope_trained"] + [f for f in ("bias", "norm_gain") if not getattr(c, f)]
    wrong = [f"{field}={ours!r}" for field, ours in vars(c).items() if ours != getattr(back, field) and field not in may_differ]
    if name == "llama" and c.n_embd % c.n_head: wrong.append(f"n_embd={c.n_embd}, not divisible by n_head={c.n_head}")
    if c.rope_scaling == "llama3" and c.trained_length % 1: wrong.append(f"block_size / rope_factor = {c.trained_length}")
    if wrong: raise ValueError(f"cannot export: transformers' {name} does not support {', '.join(wrong)}")
    for theirs, (parts, shape, transposed) in hf_places(hf, back).items():
        parts = [state[ours].cpu() if ours in state else torch.full(shape, float("weight" in ours)) for ours in parts]
        # a single part is copied only for ReLU^2, which stores c_fc twice: tensors in a file must not share memory
        whole = torch.cat(parts) if len(parts) > 1 or c.mlp == "relu2" else parts[0]
        tensors[theirs] = (whole.T if transposed else whole).to(dtype).contiguous()
    st.torch.save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f: json.dump(hf, f, indent=1)
    return name

# ---------------------------------------------------------------------------- devices and checkpoints

def pick_device(name, local_rank=0):
    """The torch.device for the knob `device`. auto: CUDA, MPS or CPU; cuda: this rank's GPU. ValueError if not available."""
    if name == "auto": name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try: device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError: raise ValueError(f"device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise ValueError(f"device={name!r} is not available, torch sees {count['cuda']} CUDA devices and {count['mps']} MPS "
                         "devices: use --device=auto")
    return device

def has_bfloat16(device):
    """True if the device multiplies bfloat16 in hardware. Others emulate it, many times slower than float32."""
    if device.type == "cuda": return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))

def why_not_compile(device):
    """None if torch.compile can work for the device, else a line about what it lacks: Triton for a GPU, else a C++ compiler."""
    if device.type == "cuda": return flash_attn.MISSING
    compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return None if shutil.which(compiler) else f"torch.compile finds no C++ compiler: install {compiler}, or set CXX"

def save_checkpoint(path, checkpoint):
    """torch.save that leaves either the old file or the new one, never half a file. OSError says what to do."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:        # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError): os.unlink(temporary)
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]}): free space or choose another --out_dir; "
                      "any earlier checkpoint is intact") from None

def load_checkpoint(path):
    """The dict that train.py saved (tensors and primitives), on the CPU. ValueError if it is missing or damaged."""
    if not os.path.isfile(path): raise ValueError(f"no checkpoint at {path}: check --out_dir, or train one first")
    try:
        with zipfile.ZipFile(path) as parts:            # torch.load does not look at the checksums
            if parts.testzip(): raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        other = os.path.join(os.path.dirname(path), "ckpt.pt" if os.path.basename(path) == "best.pt" else "best.pt")
        copy = f"copy {other} over it, or " if os.path.isfile(other) else ""
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(e).__name__}): {copy}train again") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint: raise ValueError(f"{path} was not saved by train.py")
    return checkpoint
