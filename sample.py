"""
Text from a trained GPT: everything between a checkpoint and the characters on the screen.

    python sample.py                                                # the newest run in out/, one sample, streamed
    python sample.py --start="def main" --num_samples=3 --stop='\n\n' --temperature=0.7 --top_p=0.9
    python sample.py --prompts=prompts.txt --logprobs > out.jsonl    # prompts of any lengths in one batch
    python sample.py --num_beams=4 --temperature=0                  # beam search; --best_of=8: draw eight, keep the likeliest
    python sample.py --quantize=int8 --speculate=6                  # faster: 8-bit weights, drafts; --compile for long runs
    python sample.py --interactive                                  # a conversation that stays in the cache, after --start
    python sample.py --prompts=questions.jsonl                      # prompts of several lines: {"prompt": "..."} on each line
    python sample.py --init_from=gpt2 --start="The"                 # OpenAI's weights, or a Hugging Face folder: Llama 3, Qwen3
    python sample.py --export=FOLDER                                # no sample: the model as a folder that transformers loads

The random numbers of text i, counted over all prompts, depend on seed + i alone: its prompt with `--seed=<seed + i>` gives the
same text, with or without speculation (in float32; in bfloat16 and int8 up to rounding, which may differ between batch sizes).

    attention sinks, rolling cache     Xiao et al. 2023, arXiv:2309.17453
    speculation by prompt look-up      Leviathan et al. 2022, arXiv:2211.17192; Saxena 2023, prompt-lookup-decoding
    repetition penalty                 Keskar et al. 2019, arXiv:1909.05858
    length penalty of beams            Wu et al. 2016, arXiv:1609.08144, in its simple form
    int8, one scale per output row     Dettmers et al. 2022, arXiv:2208.07339, weights only

Notation: R rows in a step, T tokens fed to each, V ids that may be drawn; the rest as in model.py.
"""
import base64, codecs, copy, dataclasses, glob, html, json, math, os, re, sys, tempfile, time, timeit
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn

import bpe, config, prepare
from bpe import ENDOFTEXT
from model import GPT, KVCache, apply_rope, filter_logits, load_checkpoint, load_hf, pick_device, save_hf, why_not_compile

BEGIN = "<|begin_of_text|>"                                         # Llama 3 expects it at the start of every text
ENDS = (ENDOFTEXT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")   # GPT-2 and ours; Llama 3; chat turns of Llama 3 and Qwen

def say(line): print(line, file=sys.stderr, flush=True)

# ---------------------------------------------------------------------------- weights

class Int8Linear(nn.Module):
    """A linear layer with an int8 weight (out, in) and one scale per output row: y = (x W8^T) * scale + bias. Each weight is off
    by at most scale / 2. Weights are rounded to multiples of the bfloat16 scale, so both paths below use the same matrix."""
    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach().float()
        scale = (w.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        self.register_buffer("weight", (w / scale.float()[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        # above 4 rows F.linear is faster; subtle: the kernel reads past the end of rows whose width is no multiple of its vectors
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < x[..., 0].numel() <= 4 and x.shape[-1] % 32 == 0:
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:       # subtle: from a bfloat16 scale inductor makes _weight_int8pack_mm, which on a GPU does without tensor cores
            wide = torch.float32 if x.is_cuda else x.dtype
            y = (nn.functional.linear(x, self.weight.to(x.dtype)).to(wide) * self.scale.to(wide)).to(x.dtype)
        return y if self.bias is None else y + self.bias

class PackedLinear(nn.Module):
    """A linear layer for a CPU, its weight in oneDNN's blocked layout, which streams from memory faster than F.linear's."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias    # 1: one row

    def forward(self, x): return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

class SplitLinear(nn.Linear):
    """A linear layer that lets inductor generate a kernel for a one-row product, which reads the weight faster than a library's.
    On a GPU the bias must be added separately, on a CPU the product must be a sum. GPT-2 124M, 40 tokens on a CPU, tokens/s:
    float32 51 (F.linear compiled 24, PackedLinear 42), bfloat16 72 (49, 56)."""
    def forward(self, x):
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x[..., 0].numel() == 1:
            y = (x.float() * self.weight.float()).sum(-1, keepdim=True).mT.to(x.dtype)      # (1, out, in) -> (1, 1, out)
        else: y = nn.functional.linear(x, self.weight)
        return y if self.bias is None else y + self.bias

def place(model, device, dtype, int8=False, pack=False):
    """Make the model ready to sample: its weights rounded or packed, in dtype, on the device; position tables stay float32."""
    pack = pack and device.type == "cpu" and dtype != torch.float16 and torch.backends.mkldnn.is_available()
    pack = pack and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for name, m in list(model.named_modules()) if int8 or pack else ():         # linear layers alone, embeddings are looked up
        if isinstance(m, nn.Linear): model.set_submodule(name, Int8Linear(m) if int8 else PackedLinear(m.to(dtype)))
    for p in model.parameters(): p.data = p.data.to(dtype)
    return model.to(device).requires_grad_(False).eval()

def find_checkpoint(cfg):
    """out_dir if it is a file; else its best.pt, or else its ckpt.pt; without an out_dir, those of the newest run in out/."""
    if os.path.isfile(cfg.out_dir): return cfg.out_dir
    folder = glob.escape(cfg.out_dir) or os.path.join("out", "*")
    found = [path for name in ("best.pt", "ckpt.pt") for path in glob.glob(os.path.join(folder, name))]
    if not found:
        raise ValueError(f"no checkpoint in {cfg.out_dir or 'out/*'}: check --out_dir, or: python train.py config/stdlib.py")
    newest = os.path.dirname(max(found, key=os.path.getmtime))
    return next(path for path in found if os.path.dirname(path) == newest)      # best.pt comes first

def ids_of(tok, *names):
    """The ids of those names that are special tokens of the tokenizer, in the order of the names."""
    return [tok.special_tokens[name] for name in names if name in tok.special_tokens]

def load(cfg, pack=False):
    """(model, tokenizer, a line about them) from out_dir, from the newest run, or, with init_from and no out_dir, from a Hugging
    Face folder; device, dtype, int8 and context length as configured. tokenizer.first: the ids to begin with if there is no
    prompt; tokenizer.chat: whether the model was fine-tuned on chats."""
    device, meta, int8 = pick_device(cfg.device), {}, cfg.quantize == "int8"
    auto = torch.bfloat16 if device.type == "cuda" or int8 and device.type == "cpu" else torch.float32    # Int8Linear's on a CPU
    dtype = auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    path = "" if cfg.out_dir else prepare.pretrained(cfg.init_from)
    if path: tok, model = bpe.Tokenizer.load(os.path.join(path, "tokenizer.json")), load_hf(path, device, dtype)
    else:
        path = find_checkpoint(cfg)
        checkpoint = load_checkpoint(path)
        tok, meta = checkpoint.get("tokenizer"), checkpoint.get("meta", {})
        if not tok: raise ValueError(f"{path} holds no tokenizer, so its ids cannot become text: train again with train.py")
        tok = bpe.Tokenizer.gpt2() if tok == "gpt2" else bpe.Tokenizer.from_dict(tok)
        model = GPT.from_checkpoint(checkpoint, path)
        if unknown := [f"{k}={v!r}" for k, v in checkpoint["config"].items() if k not in config.KINDS]:
            say(f"WARNING: {path} has knobs that this version ignores: {', '.join(unknown)}")
    if cfg.rope_scaling != "none": model.stretch(cfg.rope_scaling, cfg.rope_factor)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tok.vocab_size} tokens, but its model only {model.config.vocab_size}: "
                         "use the tokenizer that the model was trained with")
    # a model trained on a single document has never seen what follows an end-of-text token: it begins with a line end instead
    first = ids_of(tok, BEGIN, ENDOFTEXT)[:1] if meta.get("documents", {}).get("train") != 1 else []
    tok.first = first or tok.encode("\n")
    about_tok = Path(path, "tokenizer_config.json")         # of a folder: export writes the template there
    exported = about_tok.is_file() and json.dumps(prepare.CHAT_TEMPLATE) in about_tok.read_text(encoding="utf-8")
    tok.chat = "form" in meta or exported                   # trained on the answers in prepare.py's template
    about = f"{path} | {model.num_params():,} parameters | {device}, {str(dtype)[6:]}{', int8 weights' if int8 else ''}"
    return place(model, device, dtype, int8, pack), tok, about

def export(cfg):
    """Write the folder cfg.export for transformers' AutoModelForCausalLM and AutoTokenizer, either complete or not at all."""
    folder, dtype = os.path.abspath(cfg.export), "float32" if cfg.dtype == "auto" else cfg.dtype
    if os.path.exists(folder): raise ValueError(f"--export={cfg.export} exists: delete it or choose another folder")
    if cfg.quantize != "none": raise ValueError("--export writes weights in float32 or --dtype, not int8: leave out --quantize")
    model, tok, about = load(dataclasses.replace(cfg, device="cpu", dtype=dtype))
    first_of = lambda names: next((t for t in names if t in tok.special_tokens), None)
    begin, end = first_of((BEGIN, *ENDS)), first_of(ENDS)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as work:
        os.mkdir(whole := os.path.join(work, "whole"))
        family = save_hf(model, whole, getattr(torch, dtype), tok.special_tokens.get(begin), tok.special_tokens.get(end))
        tok.to_hf(os.path.join(whole, "tokenizer.json"), first_of((BEGIN,)))
        about_tok = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=begin, eos_token=end, pad_token=end,
                         model_max_length=model.config.block_size, clean_up_tokenization_spaces=False)
        if tok.chat: about_tok["chat_template"] = prepare.CHAT_TEMPLATE
        Path(whole, "tokenizer_config.json").write_text(json.dumps(about_tok, indent=1), encoding="utf-8")
        os.rename(whole, folder)
    print(f"{about} -> {folder}: {family}, {dtype}, {tok.vocab_size:,} tokens")

# ---------------------------------------------------------------------------- a continuation and its next token

class Row:
    """One continuation: its prompt and seed, the ids of the prompt and those drawn, the text that is safe to show. `finish` says
    why it ended: "end" (an end token), "stop" (a stop string) or "length"; None while it goes on. uniform[i] draws token i."""
    def __init__(self, prompt, seed, tok, cfg, ends=(), stops=(), read=0, dropped=0):
        self.prompt, self.seed, self.tok, self.ends, self.stops, self.limit = prompt, seed, tok, ends, stops, cfg.max_new_tokens
        self.ids, self.logprobs, self.held, self.text, self.finish = list(prompt), [], b"", "", None
        self.read, self.dropped = read, dropped     # ids that the cache has read, and how many of them it forgot (see make_room)
        self.uniform = torch.rand(self.limit + cfg.speculate + 1, generator=torch.Generator().manual_seed(seed)).tolist()

    tokens = property(lambda self: self.ids[len(self.prompt):])
    length = property(lambda self: self.read - self.dropped)        # in the cache

    def add(self, token, logprob):
        """Append one token. A stop string cuts the text off where the string begins, even if that was several tokens ago."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.read += 1              # the cache has just read the token before this one
        if token in self.ends: self.finish = "end"
        else:
            self.held += self.tok.decode_bytes([token])
            found = [self.held.find(s) for s in self.stops if s in self.held]
            if found: self.held, self.finish = self.held[:min(found)], "stop"
            elif len(self.logprobs) == self.limit: self.finish = "length"
        # subtle: hold back a tail that may be the start of a stop string, and (the decoder does this) an incomplete character
        tails = (n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n]))
        hold = 0 if self.finish else max(tails, default=0)
        text, used = codecs.utf_8_decode(self.held[:len(self.held) - hold], "replace", bool(self.finish))
        self.text, self.held = self.text + text, self.held[used:]

    def score(self, penalty): return sum(self.logprobs) / len(self.logprobs) ** penalty

    def draft(self, n):
        """A guess at the next tokens, at most n: those that followed the latest earlier occurrence of the text's last two."""
        if n <= 0: return []
        ids, ends = self.ids, range(len(self.ids) - 1, 1, -1)       # ends of earlier pairs, the latest first
        start = next((i for i in ends if ids[i - 2:i] == ids[-2:]), len(ids))
        return ids[start:start + n]

def draw(logits, u, cfg):
    """One token per row, (N,), from logits (N, V): the inverse of the filtered softmax's cumulative distribution at u (N,), in
    [0, 1), or argmax at temperature 0. One number per token, so a row's draws depend on its own seed and logits alone."""
    if cfg.temperature == 0: return logits.argmax(-1)
    if 0 < cfg.top_k < logits.shape[-1]:        # draw from k columns instead of V
        # the other filters then see these columns alone. By id, not by logit: rounding may swap two logits, and so the draw
        top = logits.topk(cfg.top_k, sorted=False).indices.sort(-1).values
        return top.gather(1, draw(logits.gather(1, top), u, cfg)[:, None])[:, 0]
    cdf = filter_logits(logits, cfg.temperature, 0, cfg.top_p, cfg.min_p).softmax(-1).cumsum(-1)
    # subtle: right=True never picks a token with p = 0, even at u = 0
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)[:, 0]

def penalise(logits, seen, penalty):
    """Make the tokens that occur in a row's text, seen (R, V), less likely: divide positive logits (R, T, V) by the penalty and
    multiply negative ones. `seen` is the same at all T places, because a draft repeats tokens that the text already has."""
    return torch.where(seen[:, None], torch.where(logits > 0, logits / penalty, logits * penalty), logits)

def extend(rows, picked, logp, drafts):
    """Add tokens picked (R, T), with their log-probabilities logp (R, T), to each row: the first, and each later one as long as
    its draft guessed the token before it. Returns [(r, row)] of those that have not finished."""
    for row, draft, tokens, nats in zip(rows, drafts, picked, logp):
        for token, p, guess in zip(tokens, nats, [*draft, None]):
            if row.finish: break
            row.add(token, p)
            if token != guess: break            # the tokens after it were computed for another text
    return [(r, row) for r, row in enumerate(rows) if not row.finish]

def branch(beams, logits, done, cfg):
    """One step of beam search with logits (R, V). Beams that finish are put into the list `done`, which keeps the num_beams best,
    best first. Returns [(parent, beam)], the num_beams likeliest that go on, or [] once none can overtake the last of `done`."""
    n, V, grown, logp = cfg.num_beams, logits.shape[-1], [], logits.log_softmax(-1)
    enough = n * max(2, 1 + len(beams[0].ends))         # leaves n that go on, even if every beam draws every end token
    total = logp + torch.tensor([[sum(beam.logprobs)] for beam in beams], device=logits.device)
    k = total.numel() if beams[0].stops else min(enough, total.numel())     # all: a stop string may end any number of them
    for rank, (parent, token) in enumerate(divmod(i, V) for i in total.flatten().topk(k).indices.tolist()):
        if rank >= enough and (len(grown) == n or len(beams[0].logprobs) + 1 == cfg.max_new_tokens): break
        new = copy.copy(beams[parent])
        new.ids, new.logprobs = new.ids[:], new.logprobs[:]         # copies: its siblings append to them, too
        new.add(token, logp[parent, token].item())
        if new.finish: done.append(new)
        elif len(grown) < n: grown.append((parent, new))
    done[:] = sorted(done, key=lambda row: -row.score(cfg.length_penalty))[:n]
    # the log-probability of a live beam can only fall: divided by the longest possible length, it bounds the beam's final score
    bound = max((sum(row.logprobs) / cfg.max_new_tokens ** cfg.length_penalty for _, row in grown), default=-math.inf)
    return [] if len(done) == n and done[-1].score(cfg.length_penalty) >= bound else grown

# ---------------------------------------------------------------------------- the cache, and decoding with it

def new_cache(model, rows, length):
    weight = model.transformer.wte.weight
    return KVCache(model.config, rows, min(length, model.config.block_size), weight.device, weight.dtype)

def make_room(model, cache, r, length, text, sinks, need=1):
    """Free at least `need` of the `length` positions in row r of the cache; return how many. text: the ids that the row has read.
    RoPE: drop the oldest after the first `sinks`, rotate later keys back by as many. Else: read sinks and newer half again."""
    size, sinks = cache.max_len, min(sinks, (cache.max_len - 1) // 2)
    drop = max(need, (size - sinks) // 8 if model.config.pos == "rope" else size // 2)      # many at once, so it happens rarely
    kept, end = length - sinks - drop, length - drop        # positions after the sinks that stay; the new length
    if kept <= 0: raise ValueError(f"the text is {1 - kept} tokens too long for block_size={size}: give a shorter one")
    if model.config.pos == "rope":
        cos, sin = nn.functional.normalize(model.table[:, drop], dim=0)     # (D/2,) each; YaRN scales them, a rotation must not
        for store in cache.k: store[r, :, sinks:end] = apply_rope(store[r, :, length - kept:length].float(), cos, -sin)
        for store in cache.v: store[r, :, sinks:end] = store[r, :, length - kept:length].clone()
    else:
        fresh, text = new_cache(model, 1, end), text[:sinks] + text[-kept:]
        model.hidden(torch.tensor([text], device=cache.lengths.device), fresh)
        for store, again in zip(cache.k + cache.v, fresh.k + fresh.v): store[r, :, :end] = again[0]
    return drop

def align(model, cache, rows, need, cfg):
    """Give every row room for `need` more tokens, and tell the cache how many positions each row holds."""
    for r, row in enumerate(rows):
        if (over := row.length + need - cache.max_len) > 0:
            if cfg.past_context == "error": raise ValueError(f"block_size={cache.max_len} is full: use --past_context=window")
            row.dropped += make_room(model, cache, r, row.length, row.ids[:row.read], cfg.sinks, over)
    if not cache.static: cache.set_lengths([row.length for row in rows])        # a static step gets the lengths from feed

def prefill(model, rows, cfg, stats, cache=None, static=False):
    """Read every row's ids except its last, which the first step feeds, cfg.prefill_chunk at a time; return the cache. static:
    see KVCache. cache: one with the only row's earlier text; None: make one. Short texts are padded on the right: attention is
    causal, so no token sees the padding."""
    clock, texts = time.perf_counter(), [tuple(row.ids[row.read:-1]) for row in rows]
    unique = list(dict.fromkeys(texts))         # equal prompts are read once
    if cache is not None: align(model, cache, rows, len(texts[0]), cfg)
    else:
        length = max(map(len, unique)) + 1 + cfg.max_new_tokens + cfg.speculate
        cache = new_cache(model, len(unique), 1 << (length - 1).bit_length() if static else length)     # few shapes to compile
    idx = nn.utils.rnn.pad_sequence([torch.tensor(text).long() for text in unique], batch_first=True).to(cache.lengths.device)
    for i in range(0, idx.shape[1], cfg.prefill_chunk): model.hidden(idx[:, i:i + cfg.prefill_chunk], cache)
    for row, text in zip(rows, texts): row.read += len(text)
    if len(unique) < len(rows): cache.reorder([unique.index(text) for text in texts])
    cache.static = static
    cache.set_lengths([row.length for row in rows])
    cache.lengths.tolist()                      # wait for the device
    stats.update(prompt_tokens=sum(map(len, unique)), prompt_seconds=time.perf_counter() - clock)
    return cache

def feed(rows, drafts, T, V, cfg):
    """A step's inputs, on the CPU: each row's length in the cache (R,), its last id and its draft, padded with 0 (R, T), the
    numbers to draw with (R, T), and with a repetition penalty which ids its text has (R, V)."""
    ids = [row.ids[-1:] + draft + [0] * (T - 1 - len(draft)) for row, draft in zip(rows, drafts)]
    inputs = [torch.tensor([row.length for row in rows], dtype=torch.int32), torch.tensor(ids),
              torch.tensor([row.uniform[len(row.logprobs):len(row.logprobs) + T] for row in rows])]
    if cfg.repetition_penalty != 1:
        inputs.append(torch.stack([torch.bincount(torch.tensor(row.ids), minlength=V)[:V] > 0 for row in rows]))
    return inputs

def record(step, inputs, device):
    """Return what runs step on inputs like these: step itself, or on a GPU a CUDA graph of it with the copies there and back. So
    the host launches one graph per step and waits once; without it, hundreds of kernels, compiled or not, one by one."""
    outputs = step(*inputs)                     # compiles the kernels: a recording cannot
    if not outputs[0].is_cuda: return step
    sent, received = ([x.cpu().pin_memory() for x in xs] for xs in (inputs, outputs))       # the graph's own host memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for x, y in zip(received, step(*sent)): x.copy_(y, non_blocking=True)
    def replay(*new):
        for x, y in zip(sent, new): x.copy_(y)
        graph.replay()
        torch.cuda.synchronize(device)
        return received
    return replay

@torch.inference_mode()
def decode(model, rows, cfg, V, stats, cache=None):
    """Continue rows (Row objects) together until all have finished, and yield them after each step; with num_beams continue the
    only row, and yield its best endings so far. Only ids below V are drawn. Rows that finish leave the batch (if static, once
    half have). The cache never holds a row's last id: each step feeds it, with a draft of what may follow. cache: one with the
    only row's earlier text. stats: a Counter of tokens, seconds, steps and bytes read; prompts are counted separately."""
    device, beams = model.transformer.wte.weight.device, cfg.num_beams > 1
    gpu, live, found = device.type == "cuda", rows, [] if beams else rows
    # static: shapes stay fixed, so that a step can be compiled (if cfg.compile) and, on a GPU, recorded
    static = bool(cfg.compile or gpu) and not beams and cache is None
    cache = prefill(model, rows, cfg, stats, cache, static)
    written = lambda: sum(len(row.logprobs) for row in found)
    def work(cache, lengths, new, u, *seen):    # feed's inputs -> tokens, their log-probabilities (R, T); beams: logits (R, T, V)
        cache.lengths.copy_(lengths)
        own = model.head(model.hidden(new, cache))[:, :, :V].float()
        logits = penalise(own, *seen, cfg.repetition_penalty) if seen else own
        picked = draw(logits.flatten(0, 1), u.flatten(), cfg).view_as(u)
        return [picked, own.gather(2, picked[..., None])[..., 0] - own.logsumexp(-1)] + ([logits] if beams else [])
    if static and cfg.compile:
        if cannot := why_not_compile(device): raise ValueError(f"--compile: {cannot}, or leave it out")
        for module in model.modules():
            if type(module) is nn.Linear: module.__class__ = SplitLinear
        # coordinate descent: a GPU's one-row products become kernels that include the norm, read int8 as int8, at full bandwidth
        work = torch.compile(work, dynamic=False, options={"coordinate_descent_tuning": True})
    step = lambda *inputs: work(cache, *(x.to(device, non_blocking=gpu) for x in inputs))
    recorded = {}                       # T -> its step, for the batch as it is now
    position_bytes = sum(layer[0, :, 0].nbytes for layer in cache.k + cache.v)      # of one position of one row
    weight_bytes = sum(m.weight.nbytes for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear, PackedLinear)))
    while live:
        clock, before = time.perf_counter(), written()
        align(model, cache, live, 1, cfg)
        room = min(cfg.speculate, cache.max_len - max(row.length for row in live) - 1)
        if static and room < cfg.speculate: room = 0            # two shapes to compile, not one per length of a draft
        drafts = [row.draft(min(room, row.limit - len(row.logprobs) - 1)) for row in live]
        T = 1 + (room if static else max(map(len, drafts)))
        inputs = feed(live, drafts, T, V, cfg)
        if static and T not in recorded:
            recorded[T] = record(step, inputs, device)
            clock = time.perf_counter()                         # compiling and recording do not count as decoding
        read_bytes = weight_bytes + position_bytes * sum(row.length + T for row in live)
        picked, logp, *logits = recorded.get(T, step)(*inputs)
        if beams: unfinished = branch(live, logits[0][:, 0], found, cfg)
        else: unfinished = extend(live, picked.tolist(), logp.tolist(), drafts)
        stats.update(steps=1, bytes=read_bytes, tokens=written() - before, seconds=time.perf_counter() - clock)
        yield found
        if static and 2 * len(unfinished) > len(live): continue     # each shape is recorded: keep it until half have finished
        parents, live = [r for r, _ in unfinished], [row for _, row in unfinished]
        if live and parents != list(range(len(cache.lengths))):
            cache.reorder(parents)
            recorded.clear()

# ---------------------------------------------------------------------------- what people type and see

def read_file(path):
    try: return Path(path).read_bytes().decode("utf-8")         # as prepare.py does: line ends stay as they are
    except (FileNotFoundError, IsADirectoryError): raise ValueError(f"no file {path!r}: check its path") from None
    except UnicodeDecodeError as e: raise ValueError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from None

def read_prompts(cfg, tok, size):
    """(prompts as lists of ids, their texts). ValueError: a prompt is empty, missing or too long for a context of `size`."""
    path = cfg.prompts or (cfg.start.removeprefix("FILE:") if cfg.start.startswith("FILE:") else "")
    texts = [read_file(path) if path else cfg.start]
    if cfg.prompts: texts = re.split("\r?\n", re.sub(r"\r?\n\Z", "", texts[0]))     # after the last line end there is no prompt
    if cfg.prompts.endswith(".jsonl"):
        for n, line in enumerate(texts):
            try: texts[n] = "" + json.loads(line)["prompt"]     # "" +: a TypeError unless it is text
            except (ValueError, LookupError, TypeError):
                raise ValueError(f'{path}, line {n + 1}: want {{"prompt": "..."}}') from None
    if path and "" in texts: raise ValueError(f"{path} is empty at line {texts.index('') + 1}: a prompt must have text")
    prompts, begin = [tok.encode(text, "all") if text else tok.first for text in texts], ids_of(tok, BEGIN)
    prompts = [ids if ids[:1] == begin else begin + ids for ids in prompts]         # the text may have it already
    longest = max(map(len, prompts))
    if longest > size:
        raise ValueError(f"prompt has {longest} tokens, block_size is {size}: shorten it or train with a larger block_size")
    if cfg.past_context == "error" and longest + cfg.max_new_tokens > size:
        raise ValueError(f"{longest} prompt tokens and max_new_tokens={cfg.max_new_tokens} do not fit block_size={size}: "
                         f"ask for at most {size - longest}, or use --past_context=window")
    return prompts, texts

def read_stops(cfg, tok):
    r"""cfg.stop -> (ids that end a row, byte strings that end it): "\n\n|<|endoftext|>" -> ({id of <|endoftext|>}, [b"\n\n"])"""
    ends, strings = set(ids_of(tok, *ENDS)), []
    for stop in re.split(r"(?<!<)\|(?!>)", cfg.stop) if cfg.stop else []:       # the bars of <|...|> do not separate
        if not stop: raise ValueError(f"stop={cfg.stop!r} has an empty part, which would end all samples at once: remove a |")
        if stop in tok.special_tokens: ends.add(tok.special_tokens[stop])
        elif re.fullmatch(r"<\|.*\|>", stop):
            raise ValueError(f"stop={stop!r} is not one of this tokenizer's special tokens: {list(tok.special_tokens)}")
        else: strings.append(stop.replace("\\n", "\n").replace("\\t", "\t").encode())
    return ends, strings

def report(stats, device):
    """Print the speed of prefill (if any) and decoding, and its memory traffic next to that of a sum over 256 MB (GPU: 1 GB)."""
    x = torch.ones(2 ** (28 if device.type == "cuda" else 26), device=device)
    peak = x.nbytes / min(timeit.repeat(lambda: x.sum().item(), number=1)) / 1e9
    used, read, written = stats["bytes"] / stats["seconds"] / 1e9, stats["prompt_tokens"], stats["tokens"]
    prefilled = f"prefill {read:,} tokens at {read / stats['prompt_seconds']:,.0f} tok/s | " if read else ""
    say(f"\n{prefilled}decode {written:,} at {written / stats['seconds']:,.1f} tok/s, {written / stats['steps']:.2f} per pass | "
        f"weights and cache read at {used:.1f} GB/s, {used / peak:.0%} of the {peak:.1f} GB/s that a plain sum reaches")

def interact(model, tok, cfg, begin, ends, stops):
    """A conversation that starts with the ids `begin`: each line typed goes to the cache and is continued, or, for a chat model,
    is put into the template and answered."""
    cache, row = new_cache(model, 1, model.config.block_size), Row(begin, cfg.seed - 1, tok, cfg)
    say(f"each line {'is a message' if tok.chat else 'is continued'}; Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try: line = input("> " * os.isatty(0))
        except (EOFError, RuntimeError): return             # RuntimeError: stdin is closed
        if tok.chat and row.ids != begin and row.ids[-1] != tok.special_tokens[ENDOFTEXT]:
            row.ids.append(tok.special_tokens[ENDOFTEXT])   # it ends every answer, even one that was cut short
        line = tok.encode(prepare.prompt_of(line) if tok.chat else line + "\n", "all")
        before, shown, row = row, 0, Row(row.ids + line, row.seed + 1, tok, cfg, ends, stops, row.read, row.dropped)
        try:
            for _ in decode(model, [row], cfg, tok.vocab_size, Counter(), cache):
                print(row.text[shown:], end="", flush=True)
                shown = len(row.text)
        except KeyboardInterrupt: pass
        except ValueError as e:                         # no room: the conversation goes on without this line
            say(f"error: {e}")
            row = before
        print()

def visualize(model, row, path):
    """Write one self-contained HTML page: each token's probability, its likeliest alternatives, what each head attended to."""
    c, maps, name = model.config, [], lambda t: row.tok.decode([t])
    ids = row.ids[:min(c.block_size, math.isqrt(2 ** 24 // (c.n_layer * c.n_head)))]    # maps: T*T bytes per head, at most 16 MiB
    def look(attn, args):       # attention of model.py once more, which gives away no weights
        q, k, _ = attn.qkv(*args[:2])                                                   # (1, H, T, D), (1, K, T, D)
        s = q.float() @ k.float().repeat_interleave(c.n_head // c.kv_heads, 1).mT / math.sqrt(c.head_dim)
        seen = torch.ones_like(s, dtype=torch.bool).tril().triu(1 - (attn.window or len(ids)))
        maps.append((s.masked_fill(~seen, -torch.inf).softmax(-1) * 255).round().to(torch.uint8).cpu())
    hooks = [block.attn.register_forward_pre_hook(look) for block in model.transformer.h]
    logits = model(torch.tensor([ids], device=model.transformer.wte.weight.device))[0][0, :-1, :row.tok.vocab_size]
    for hook in hooks: hook.remove()
    spans = [f"<span>{html.escape(name(ids[0]))}</span>"]
    for t, p in zip(ids[1:], logits.float().softmax(-1).cpu()):
        title = html.escape("\n".join(f"{p[i].item():.1%} {name(i)!r}" for i in [t, *p.topk(8).indices.tolist()]))
        red = min(0.8, -math.log(p[t] + 1e-9) / 10)
        spans.append(f'<span title="{title}" style="--red: {red:.2f}">{html.escape(name(t))}</span>')
    maps = base64.b64encode(torch.cat(maps).numpy().tobytes()).decode()
    Path(path).write_text(PAGE % (c.n_layer - 1, c.n_head - 1, "".join(spans), maps, c.n_head), encoding="utf-8")

PAGE = r"""<!doctype html><meta charset="utf-8"><title>sample.py --visualize</title>
<style>body {font: 15px/1.7 monospace; margin: 2em} p {white-space: pre-wrap} span {background: rgb(230 60 30/var(--red))}</style>
layer <input type="number" min="0" max="%d" value="0"> head <input type="number" min="0" max="%d" value="0"><br>
Red: improbable. Point at a token to see its probability, the likeliest tokens at its place, and in blue where the head looked.
<p>%s</p><script>
const maps = Uint8Array.from(atob("%s"), c => c.charCodeAt(0)), heads = %d;
const [layer, head] = document.querySelectorAll("input"), spans = [...document.querySelectorAll("span")];
const paint = color => spans.forEach((span, i) => span.style.background = color(i));
spans.forEach((span, on) => {
  const look = i => maps[((+layer.value * heads + +head.value) * spans.length + on) * spans.length + i];
  span.onmouseenter = () => paint(i => `rgba(30, 90, 230, ${Math.sqrt(look(i) / 255)})`);
  span.onmouseleave = () => paint(() => "");
});
</script>"""

def main(cfg):
    if cfg.export: return export(cfg)
    barred = "prompts num_samples num_beams best_of logprobs compile visualize".split() if cfg.interactive else ()
    if wrong := [key for key in barred if getattr(cfg, key) not in (getattr(config.Config, key), False)]:
        raise ValueError(f"--interactive continues one text as you type it: leave out {', '.join(wrong)}")
    model, tok, about = load(cfg, pack=not cfg.compile or cfg.num_beams > 1)
    (prompts, texts), (ends, stops) = read_prompts(cfg, tok, model.config.block_size), read_stops(cfg, tok)
    if cfg.visualize and (os.path.isdir(cfg.visualize) or not os.path.isdir(os.path.dirname(cfg.visualize) or ".")):
        raise ValueError(f"--visualize={cfg.visualize} cannot be written: give the name of a file, in a folder that exists")
    say(f"{about} | {model.set_backend(training=False)}\n")
    if cfg.interactive: return interact(model, tok, cfg, prompts[0], ends, stops)
    beams, ranked, as_json = cfg.num_beams > 1, cfg.best_of > cfg.num_samples, bool(cfg.prompts) or cfg.logprobs
    draws, per_batch = (1, 1) if beams else (max(cfg.num_samples, cfg.best_of), cfg.batch_size)      # rows per prompt; per batch
    rows = [Row(p, cfg.seed + i * draws + j, tok, cfg, ends, stops) for i, p in enumerate(prompts) for j in range(draws)]
    page = lambda rows: "\n---------------\n".join(texts[0] + row.text for row in rows)
    begun, shown, stats = 0, 0, Counter()           # rows begun, characters printed
    for i, text in enumerate(texts):
        while begun < (i + 1) * draws:         # a batch may cover several prompts, or a prompt need several batches
            for found in decode(model, rows[begun:begun + per_batch], cfg, tok.vocab_size, stats):
                if as_json or beams or ranked: continue
                # stream the first row that has not finished; later rows are printed when it is their turn
                current = next((j for j, row in enumerate(rows) if not row.finish), draws)
                new = page(rows[:current + 1])[shown:]
                print(new, end="", flush=True)
                shown += len(new)
            begun += per_batch
        best = found if beams else rows[i * draws:(i + 1) * draws]
        if ranked: best = sorted(best, key=lambda row: -row.score(cfg.length_penalty))
        best = best[:cfg.num_samples]
        if cfg.visualize and i == 0: visualize(model, best[0], cfg.visualize)
        if not as_json: print(page(best)[shown:])
        for j, row in enumerate(best if as_json else ()):
            data = dict(prompt=text, sample=j, text=row.text, seed=row.seed, tokens=len(row.logprobs), finish=row.finish,
                        logprob=sum(row.logprobs))
            if cfg.logprobs: data["token_logprobs"] = [(tok.decode([t]), p) for t, p in zip(row.tokens, row.logprobs)]
            print(json.dumps(data), flush=True)
    report(stats, model.transformer.wte.weight.device)

if __name__ == "__main__":
    config.run(main)
