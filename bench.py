"""
Every figure of the README, measured against the peer on the same machine in the same run.

    python bench.py eval --out_dir=out/x --input=FILE --task=hellaswag,FILE.jsonl     # bits per byte of texts; multiple choice
    python bench.py attention                     # flash_attn.py against every backend of torch's SDPA (on a GPU)
    python bench.py tokenizer [FILE]              # bpe.py against tiktoken, rustbpe and tokenizers, where installed
    python bench.py sample                        # sample.py against no cache and Hugging Face's generate, batch sizes, int8
    python bench.py context --out_dir=out/x       # perplexity of a finished run past the context it was trained at
    python bench.py train config/stdlib.py        # step time, tokens/s, MFU: modern and classic, compile, our attention and SDPA
    python bench.py size config/gpt2_124m.py      # parameters, FLOPs, memory, time and compute-optimal tokens before spending any
    python bench.py plot out/a out/b              # loss of several runs against steps, tokens and seconds (needs matplotlib)
    python bench.py scaling out/a out/b out/c     # a loss law fitted to finished runs, and what it says of larger ones

Speed is a ratio: contestants take turns within one run and the median counts, so a machine that slows down slows all of them.
"""
import argparse, csv, dataclasses, glob, hashlib, importlib.util, io, json, math, os, re, resource, statistics, subprocess, sys, sysconfig, tarfile, \
    tempfile, time, zipfile
from collections import Counter

import numpy as np

import bpe, config
if sys.argv[1:2] != ["tokenizer-contender"]:        # whose seconds count from its start: it must not pay for torch
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    import flash_attn, prepare, sample as sampler, train as trainer
    from model import GPT, pick_device

# ---------------------------------------------------------------------------- tools

def table(header, rows):
    """Print rows of strings and numbers in columns wide enough for all of them."""
    text = [header] + [[c if isinstance(c, str) else f"{c:,.2f}" if isinstance(c, float) else f"{c:,}" for c in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text: print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))


def take_turns(contestants, rounds):
    """{name: function} -> {name: median seconds}, each called once to warm up and then in turn, GPU work included."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            if i: times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def read_log(folder):
    """The records of a run's log.jsonl, as {"loss": [...], "val_bpb": [...]} and so on, only lines that have the key."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path): raise ValueError(f"no {path}: give the out_dir of a run, e.g. out/stdlib")
    with open(path, encoding="utf-8") as f: return [json.loads(line) for line in f]


def pyplot():
    try: import matplotlib
    except ImportError: raise ValueError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot

# ---------------------------------------------------------------------------- training

def bench_train(argv):
    """One optimizer step of the config's size, modern and classic, compile on and off, our attention and SDPA."""
    cfg = config.load(argv)
    machine = trainer.Machine(cfg)
    variants = {"modern": cfg, "classic (GPT-2, AdamW)": config.load(argv + [os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "classic.py")])}
    contestants, flops, peaks = {}, {}, {}
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size), device=machine.device)
    for name, c in variants.items():
        for compiled in (False, True):
            for backend in ("flash_attn", "sdpa") if machine.device.type == "cuda" else ("sdpa",):
                raw = GPT(c.model()).to(machine.device)
                raw.set_backend()
                if raw.backend != backend:
                    raw.backend = backend
                    for block in raw.transformer.h: block.attn.backend = backend
                optimizers, model = raw.configure_optimizers(c), torch.compile(raw) if compiled else raw
                label = f"{name}, {backend}" + (", compiled" if compiled else "")
                def step(label=label, model=model, optimizers=optimizers):
                    if machine.device.type == "cuda": torch.cuda.reset_peak_memory_stats()
                    with machine.autocast: loss = model(x, x)[1]
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    if machine.device.type == "cuda": peaks[label] = torch.cuda.max_memory_allocated() / 2 ** 20
                contestants[label], flops[label] = step, raw.estimate_flops() * x.numel()
    times = take_turns(contestants, rounds=10)
    print(f"{machine.name}, torch {torch.__version__}, {str(machine.dtype).removeprefix('torch.')}, {x.numel():,} tokens a step")
    slowest = times["classic (GPT-2, AdamW), sdpa"]
    table(["step", "ms", "tokens/s", "TFLOP/s", "MFU", "speed", "peak MiB"],
          [[n, t * 1e3, f"{x.numel() / t:,.0f}", flops[n] / t / 1e12, f"{flops[n] / t / machine.peak:.1%}" if machine.peak else "unknown peak",
            f"{slowest / t:.2f} x", f"{peaks[n]:,.0f}" if n in peaks else "-"] for n, t in times.items()])

# ---------------------------------------------------------------------------- sizing

def parts(model):
    """Parameters by part: {"embedding": n, "attention": n, ...}."""
    groups = {"wte": "embedding", "wpe": "positions", "attn": "attention", "mlp": "MLP", "lm_head": "head"}
    count = {}
    for name, p in model.named_parameters():
        part = next((label for key, label in groups.items() if f".{key}." in f".{name}"), "norms")
        count[part] = count.get(part, 0) + p.numel()
    return count


def bench_size(argv):
    cfg = config.load(argv)
    with torch.device("meta"): model = GPT(cfg.model())
    n, flops, count = model.num_params(), model.estimate_flops(), parts(model)
    tokens = cfg.max_iters * (cfg.tokens_per_step or cfg.batch_size * cfg.block_size)
    table(["parameters", "count", "share"], [[k, v, f"{v / n:.1%}"] for k, v in count.items()] + [["all", n, "100.0%"]])
    print()
    parts_of = trainer.estimate_memory(cfg, model)
    table(["memory a device", "MiB"], [[k, v / 2 ** 20] for k, v in parts_of.items()] + [["all", sum(parts_of.values()) / 2 ** 20]])
    optimal = 20 * n
    print(f"\n{flops / 1e6:,.1f} MFLOP a token; {tokens:,} tokens in {cfg.max_iters:,} steps: {flops * tokens:.3g} FLOP, {tokens / n:.1f} tokens a parameter\n"
          f"Chinchilla's 20 tokens a parameter (arXiv:2203.15556) would be {optimal:,} tokens, {flops * optimal:.3g} FLOP\n")
    table(["one GPU at 40% of its dense bf16 peak", "this run, hours", "20 tokens a parameter, hours"],
          [[name, flops * tokens / (0.4 * peak) / 3600, flops * optimal / (0.4 * peak) / 3600] for name, peak in trainer.PEAK_FLOPS.items()])

# ---------------------------------------------------------------------------- seeing runs

def bench_plot(argv):
    if not argv: raise ValueError("name the runs to draw: python bench.py plot out/a out/b")
    runs = {folder: read_log(folder) for folder in argv}
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for axis, key in zip(axes, ("step", "tokens", "seconds")):
        for folder, log in runs.items():
            line, = axis.plot(*zip(*[(r[key], r["loss"]) for r in log if "loss" in r]), alpha=0.4)
            points = [(r[key], r["val_loss"]) for r in log if "val_loss" in r]
            if points: axis.plot(*zip(*points), "o-", color=line.get_color(), label=f"{folder}, best {min(p[1] for p in points):.4f}")
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per token: thin = training, dots = validation")
    axes[0].legend()
    path = os.path.join(argv[0], "loss.png")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def fit_law(compute, loss):
    """
    (E, A, a) of loss = E + A * compute^-a (Kaplan et al. 2020, arXiv:2001.08361; Hoffmann et al. 2022): for every E on a grid below the lowest
    loss a straight line in logarithms, the E with the least squared error in the loss wins. Needs three runs; more are better.
    """
    best = None
    for E in np.linspace(0, min(loss) * 0.999, 2000):
        slope, intercept = np.polyfit(np.log(compute), np.log(np.array(loss) - E), 1)
        error = np.square(E + np.exp(intercept) * np.array(compute) ** slope - loss).sum()
        if best is None or error < best[0]: best = error, E, math.exp(intercept), -slope
    return best[1:]


def bench_scaling(argv):
    if len(argv) < 3: raise ValueError("a law of three unknowns needs at least three runs: python bench.py scaling out/a out/b out/c")
    points = []
    for folder in argv:
        with open(os.path.join(folder, "config.json")) as f: saved = json.load(f)
        with torch.device("meta"): model = GPT(config.GPTConfig(**{f.name: saved[f.name] for f in dataclasses.fields(config.GPTConfig)}))
        log = [r for r in read_log(folder) if "val_bpb" in r]
        if not log: raise ValueError(f"{folder} has no validation loss yet")
        points.append((model.estimate_flops() * log[-1]["tokens"], log[-1]["val_bpb"], model.num_params(), folder))
    points.sort()
    E, A, a = fit_law([p[0] for p in points], [p[1] for p in points])
    table(["run", "parameters", "FLOP", "bits/byte", "law"], [[f, n, f"{c:.3g}", f"{l:.4f}", f"{E + A * c ** -a:.4f}"] for c, l, n, f in points])
    print(f"\nbits per byte = {E:.4f} + {A:.4g} * FLOP^-{a:.4f}")
    table(["compute of the largest run", "predicted bits/byte"], [[f"{k} x", f"{E + A * (k * points[-1][0]) ** -a:.4f}"] for k in (2, 4, 10, 100)])

# ---------------------------------------------------------------------------- attention

def bench_attention(argv, out=os.path.join("out", "bench"), rounds=15):
    """flash_attn.py against every backend of torch's scaled_dot_product_attention, forward and backward, bf16: median times of runs
    that take turns, TFLOP/s (4*B*H*T*S*D forward, half if causal, 2.5 times that backward), peak memory, ratios. A table, attention.csv,
    a plot where matplotlib is there. Without a GPU: what can be said of correctness and memory."""
    if not torch.cuda.is_available(): return bench_attention_cpu()
    device, dtype = torch.device("cuda"), torch.bfloat16

    def sdpa(backend):
        def attend(q, k, v, causal, window):
            if window: raise RuntimeError("no sliding window without a T x S mask")
            with sdpa_kernel(backend): return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return attend

    def decode(q, k, v, causal, window):
        return flash_attn.flash_decode(q, k, v, torch.full((len(q),), k.shape[2], device=device, dtype=torch.int32), window)

    def milliseconds(f):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    peers = {"ours": flash_attn.flash_attention, "flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
             "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION), "math": sdpa(SDPBackend.MATH)}
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=dtype)
    peak = 2 * 8192 ** 3 / statistics.median([milliseconds(lambda: a @ b) for _ in range(rounds + 3)][3:]) / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; matrix product 8192^3: {peak:.0f} TFLOP/s")
    # name, B, H, K, T, S, D, causal, window: 16k tokens in all, 2048 wide
    cases = [("", max(1, 16384 // T), 2048 // D, 2048 // D, T, T, D, causal, 0)
             for D in (64, 128) for causal in (True, False) for T in (512, 1024, 2048, 4096, 8192, 16384)]
    cases += [("GQA 4", 4, 16, 4, 4096, 4096, 128, True, 0), ("window 1024", 1, 16, 16, 16384, 16384, 128, True, 1024),
              ("decode", 8, 16, 4, 1, 16384, 128, False, 0), ("decode", 1, 16, 4, 1, 65536, 128, False, 0)]
    print(f"{'':12}{'pass':9}{'B':>3}{'H':>3}{'K':>3}{'T':>6}{'S':>6}{'D':>4} causal  peer       {'ms':>9}{'TFLOP/s':>9}{'% of peak':>10}"
          f"{'MiB':>8}  ours is faster")
    rows, L2 = [], torch.empty(2 ** 28, dtype=torch.uint8, device=device)       # written between runs, so that none finds its inputs cached
    for name, B, H, K, T, S, D, causal, window in cases:
        q, k, v = [torch.randn(B, length, heads, D, device=device, dtype=dtype).transpose(1, 2).requires_grad_(name != "decode")
                   for heads, length in ((H, T), (K, S), (K, S))]
        flops, runs = 4 * B * H * T * (min(window, S) if window else S) * D / (2 if causal and not window else 1), {}
        for peer, attend in {**peers, **({"ours": decode} if name == "decode" else {})}.items():
            try:                                                                # backends refuse some cases, and math may not fit
                forward = lambda attend=attend: attend(q, k, v, causal, window)
                y = forward()
                runs[peer, "forward"] = forward
                if name == "decode": continue
                runs[peer, "backward"] = lambda y=y, dy=torch.randn_like(y): torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)
                runs[peer, "backward"]()
            except RuntimeError: runs = {key: f for key, f in runs.items() if key[0] != peer}
        times, memory = {key: [] for key in runs}, {}
        for _ in range(rounds):                                                 # in turns: a slower clock slows all of them
            for key, f in runs.items():
                L2.zero_()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                times[key].append(milliseconds(f))
                memory[key] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        for (peer, which), ms in sorted(((key, statistics.median(t)) for key, t in times.items()), key=lambda x: x[0][1], reverse=True):
            rate, ratio = flops * (2.5 if which == "backward" else 1) / ms / 1e9, ms / statistics.median(times["ours", which])
            rows.append(dict(case=name, which=which, B=B, H=H, K=K, T=T, S=S, D=D, causal=causal, window=window, peer=peer, ms=ms,
                             tflops=rate, of_peak=rate / peak, mib=memory[peer, which], ours_is_faster=ratio))
            print(f"{name:12}{which:9}{B:3}{H:3}{K:3}{T:6}{S:6}{D:4} {causal!s:6}  {peer:10} {ms:9.3f}{rate:9.1f}{rate / peak:10.1%}"
                  f"{memory[peer, which]:8.0f}  {ratio:.2f} x", flush=True)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "attention.csv"), "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out}/attention.csv")
    try: plt = pyplot()
    except ValueError as e: return print(e)
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), sharex=True)
    panels = [(which, D, causal) for which in ("forward", "backward") for D in (64, 128) for causal in (True, False)]
    for axis, (which, D, causal) in zip(axes.flat, panels):
        for peer in peers:
            points = [(r["T"], r["tflops"]) for r in rows if (r["case"], r["which"], r["D"], r["causal"], r["peer"]) == ("", which, D, causal, peer)]
            if points: axis.plot(*zip(*points), marker="o", label=peer)
        axis.set(xscale="log", title=f"{which}, D {D}, {'causal' if causal else 'not causal'}", xlabel="T = S", ylabel="TFLOP/s")
        axis.legend()
    figure.savefig(os.path.join(out, "attention.png"), dpi=120, bbox_inches="tight")
    print(f"wrote {out}/attention.png")


def bench_attention_cpu():
    """No GPU: no speed. What each pass keeps of a training step, and, under TRITON_INTERPRET=1, the kernels' error on a small case."""
    print("no CUDA GPU: speed not measured. Memory a layer keeps from forward to backward beyond q, k, v and the output, B 1, H 12, bf16:")
    for T in (1024, 4096, 16384):
        stats = flash_attn.new_stats(torch.empty(1, 12, T, 64, device="meta")).nbytes
        print(f"  T {T:6}: flash {stats / 2 ** 20:8.2f} MiB   naive {12 * T * T * 2 / 2 ** 20:9.1f} MiB   {12 * T * T * 2 / stats:7.0f} x")
    q, k, v = torch.randn(3, 1, 2, 150, 64, generator=torch.Generator().manual_seed(0))
    if flash_attn.why_not(q, k, v): return print("correctness: TRITON_INTERPRET=1 python bench.py attention runs the kernels on the CPU")
    leaves = [[x.to(t).requires_grad_() for x in (q, k, v)] for t in (torch.float32, torch.float64)]
    outs = [f(*x) for f, x in zip((flash_attn.flash_attention, flash_attn.attention_ref), leaves)]
    pairs = [outs, *zip(*[torch.autograd.grad(o.square().sum(), x) for o, x in zip(outs, leaves)])]
    print("correctness, float32 under the interpreter, largest error over largest value:",
          *[f"{n} {((a - b).abs().max() / b.abs().max()).item():.1e}" for n, (a, b) in zip(("out", "dq", "dk", "dv"), pairs)])

# ---------------------------------------------------------------------------- the tokenizer

def tokenizer_contender(job, name, path, vocab_size, vocab, started):
    """One training or encoding, in a process of its own: prints seconds, peak MB, bytes, tokens and a digest of the result as JSON."""
    def pieces(parts):   # the same for everyone: parts of the file whose words are the words of the whole
        return (piece.decode() for piece in bpe.cut(parts, bpe.GPT2_SPLIT))
    def blocks():
        with open(path, "rb") as f:
            yield from iter(lambda: f.read(1 << 20), b"")
    digest, out, size = lambda data: hashlib.sha256(data).hexdigest(), {}, os.path.getsize(path)
    if job == "train":
        if name == "bpe.py":
            tok = bpe.Tokenizer.train([blocks()], int(vocab_size), special_tokens=())
        elif name == "rustbpe":
            tok = importlib.import_module(name).Tokenizer()
            tok.train_from_iterator(pieces(blocks()), int(vocab_size), pattern=bpe.GPT2_SPLIT)
        else:
            hf = importlib.import_module(name)
            tok = hf.Tokenizer(hf.models.BPE())
            tok.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tok.train_from_iterator(pieces(blocks()), hf.trainers.BpeTrainer(
                vocab_size=int(vocab_size), initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        out["seconds"] = time.time() - float(started)   # the whole process, start-up and reading included
        tokens = list(tok.vocab.values()) if name == "bpe.py" else sorted(tok.get_mergeable_ranks(), key=lambda t: t[1]) \
            if name == "rustbpe" else []   # Hugging Face breaks ties by its own order of the bytes: test_all.py compares, renumbered
        tokens = [bytes(t if name == "bpe.py" else t[0]) for t in tokens]
        out["digest"] = digest(json.dumps([t.hex() for t in tokens]).encode()) if tokens else None
        if name == "bpe.py":
            tok.save(vocab)
    else:
        ours = bpe.Tokenizer.load(vocab)
        with open(path, encoding="utf-8", newline="") as f:
            text = f.read(20_000_000 if name == "tokenizers" else -1)   # the slow one gets a part
        if name == "bpe.py":
            ours.encode("a")    # what tiktoken has from its start, ours makes when first used
            run = lambda: ours.encode_batch([text])[0]
        elif name == "tiktoken":
            encoding = ours.to_tiktoken()
            run = lambda: encoding.encode_ordinary(text)
        else:
            with tempfile.TemporaryDirectory() as folder:
                plain = bpe.Tokenizer(ours.merges, ours.pattern, (), None if ours._own else ours._tokens)   # theirs would find special tokens in the text
                plain.to_hf(os.path.join(folder, "tokenizer.json"))
                theirs = importlib.import_module(name).Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
            parts = list(pieces([text]))
            run = lambda: [i for e in theirs.encode_batch_fast(parts) for i in e.ids]
        began = time.time()
        ids = run()
        out["seconds"], size = time.time() - began, len(text.encode())
        out["tokens"], out["digest"] = len(ids), digest(np.asarray(ids, np.uint32).tobytes())
        if name == "tokenizers":
            out["equal"] = list(ids) == ours.encode(text)
    print(json.dumps(out | {"bytes": size, "MB": own_megabytes()}))


def own_megabytes():
    """Peak memory of this process. subtle: on Linux ru_maxrss begins at the parent's, VmHWM does not."""
    try:
        with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tree_megabytes(pid):
    """Memory of a process and its workers now, shared pages counted once (Linux; elsewhere 0)."""
    try:
        kids = [kid for path in glob.glob(f"/proc/{pid}/task/*/children") for kid in open(path).read().split()]
        return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")) / 1024 + \
            sum(map(tree_megabytes, kids))
    except OSError:   # it has just ended
        return 0


def contend(call, env):
    """-> what the contender printed, its peak memory raised to that of the whole tree of processes, seen every tenth of a second."""
    peak, process = 0, subprocess.Popen(call, stdout=subprocess.PIPE, env=env)
    while process.poll() is None:
        peak = max(peak, tree_megabytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"error: {' '.join(call[2:5])} failed")
    result = json.loads(process.stdout.read())
    return result | {"MB": max(peak, result["MB"])}


def bench_tokenizer(argv):
    """Training and encoding against tiktoken, rustbpe and tokenizers, whichever is installed: each run a process of its own."""
    parser = argparse.ArgumentParser(prog="bench.py tokenizer")
    parser.add_argument("file", nargs="?", help="UTF-8 text (default: Python's own standard library)")
    parser.add_argument("--vocab_size", default="32000")
    parser.add_argument("--vocab", help="encode with this tokenizer saved by bpe.py instead of the one trained")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", default="train,encode")
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = a.file or os.path.join(folder, "stdlib.txt")
        if not a.file:
            with open(path, "wb") as out:
                for name in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
                    with open(name, "rb") as f:
                        out.write(f.read().decode("utf-8", "replace").encode())
        trained = os.path.join(folder, "tok.json")
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, median of {a.runs}, {os.cpu_count()} cores (encoding: one)")
        print(f"{'':8}{'':12}{'seconds':>9}{'MB/s':>8}{'peak MB':>9}{'bytes/token':>13}  result")
        for job, names in ("train", ("bpe.py", "rustbpe", "tokenizers")), ("encode", ("bpe.py", "tiktoken", "tokenizers")):
            want = None
            for name in [n for n in names if job in a.jobs and (n == "bpe.py" or importlib.util.find_spec(n))]:
                vocab = a.vocab if a.vocab and job == "encode" else trained
                threads = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} if job == "encode" else {}
                runs = []
                while len(runs) < a.runs and (not runs or runs[0]["seconds"] < 30):   # the slowest run once
                    call = [sys.executable, sys.argv[0], "tokenizer-contender", job, name, path, a.vocab_size, vocab, str(time.time())]
                    runs.append(contend(call, os.environ | threads))
                r, seconds = runs[0], statistics.median(r["seconds"] for r in runs)
                want = want or r["digest"]
                same = r.get("equal", r["digest"] == want) if r["digest"] else None
                ratio = f"{r['bytes'] / r['tokens']:.3f}" if "tokens" in r else ""
                print(f"{job:8}{name:12}{seconds:9.2f}{r['bytes'] / 1e6 / seconds:8.1f}{max(r['MB'] for r in runs):9.0f}{ratio:>13}  "
                      + {None: "not compared", True: "same", False: "DIFFERENT"}[same], flush=True)

# ---------------------------------------------------------------------------- sampling

def bench_sample(argv):
    """
    Tokens/s of writing, random weights of the config's size (default: GPT-2 124M), without a cache, with Hugging Face's generate where it
    is installed, and with ours in float32, bfloat16 and int8; then over batch sizes and prompt lengths. --max_new_tokens, --device.
    """
    cfg = config.load(argv or [os.path.join("config", "gpt2_124m_classic.py")])
    cfg, device, tok = dataclasses.replace(cfg, temperature=1.0, top_k=200), pick_device(cfg.device), bpe.Tokenizer([])
    tok.decode_bytes = lambda ids: b"."                 # random weights write random ids: nothing to read
    n = min(cfg.max_new_tokens, cfg.block_size - 1)

    def ours(model, batch, prompt, n, static=False):
        c = dataclasses.replace(cfg, max_new_tokens=n)
        rows, stats = [sampler.Row([1 + i % 7] * prompt, i, tok, c) for i in range(batch)], Counter()
        for _ in sampler.decode(model, rows, c, cfg.vocab_size, stats, static=static): pass
        return stats

    @torch.inference_mode()
    def recompute(model, n):                            # nanoGPT's way: the whole text through the model for every token
        idx = torch.ones(1, 1, dtype=torch.long, device=device)
        for i in range(n):
            logits = model.head(model.hidden(idx)[:, -1])
            idx = torch.cat((idx, sampler.draw(logits, torch.full((1,), 0.5, device=device), cfg)[:, None]), 1)
        return idx.tolist()

    def seconds(f, *args):
        start = time.perf_counter()
        f(*args)
        return time.perf_counter() - start

    torch.manual_seed(cfg.seed)
    raw, rows, sweep = GPT(cfg.model()).eval(), [], []
    kinds = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8")]
    weights, plain = raw.state_dict(), sampler.place(raw, device, torch.float32)
    recompute(plain, 8)
    base = n / seconds(recompute, plain, n)
    rows.append(("every token anew, as nanoGPT, float32", base, 1.0))
    try: import transformers
    except ImportError: print("Hugging Face is left out: pip install transformers")
    else:
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
                                          n_layer=cfg.n_layer, n_head=cfg.n_head, bos_token_id=0, eos_token_id=None)).eval().to(device)
        start = torch.ones(1, 1, dtype=torch.long, device=device)
        work = lambda k: hf.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=k, min_new_tokens=k, do_sample=True, top_k=200)
        work(8)
        rate = n / seconds(work, n)
        rows.append(("Hugging Face generate, cached, float32", rate, rate / base))
    for dtype, quantize in kinds:
        model = GPT(cfg.model())
        model.load_state_dict(weights)
        model = sampler.place(model, device, getattr(torch, dtype), quantize, pack=True)
        ours(model, 1, 1, 8)
        rate = n / seconds(ours, model, 1, 1, n)
        name = f"{dtype}, int8 weights" if quantize == "int8" else dtype
        rows.append((f"sample.py, {name}", rate, rate / base))
        for batch, prompt, length in ((1, 512, 32), (4, 16, 32), (16, 16, 32), (64, 16, 16)):
            if prompt + length > cfg.block_size: continue
            s = ours(model, batch, prompt, length)
            sweep.append((name, batch, prompt, length, s["prompt_tokens"] / s["prompt_seconds"], s["tokens"] / s["seconds"], s["bytes"] / s["seconds"] / 1e9))
    print(f"\n{plain.num_params():,} parameters, {n} tokens from one, {device}, {torch.get_num_threads()} CPU threads")
    table(("", "tokens/s", "times"), rows)
    print()
    table(("sample.py", "batch", "prompt", "new", "prefill tok/s", "decode tok/s", "GB/s read"), sweep)


def bench_context(argv):
    """
    Perplexity of the last tokens before a length, as the length passes the context a finished run was trained at (--out_dir): each RoPE
    scaling, and the rolling window with and without attention sinks. Columns differ in their text: compare within one.
    """
    torch.set_grad_enabled(False)
    cfg = config.load(argv)
    plain, tok, _ = sampler.load(dataclasses.replace(cfg, compile=True, rope_scaling="none", rope_factor=1.0))
    c, n, rows = plain.config, plain.config.block_size, []
    data, device = np.memmap(os.path.join("data", cfg.dataset, "val.bin"), dtype="<u2", mode="r"), plain.transformer.wte.weight.device
    texts = torch.from_numpy(np.stack([data[i:i + 8 * n + 1] for i in np.linspace(0, len(data) - 8 * n - 1, 24).astype(int)]).astype(np.int64)).to(device)
    lengths, last = (n, 2 * n, 4 * n, 8 * n), n // 2

    def perplexity(logits, length):                     # logits (B, >= last, V) of the tokens up to `length`
        targets = texts[:, length - last + 1:length + 1]
        return math.exp(F.cross_entropy(logits[:, -last:].float().flatten(0, 1), targets.flatten()).item())

    for kind in ("none", "linear", "ntk", "yarn", "llama3") if c.pos == "rope" else ():
        row = [f"rope_scaling={kind}"]
        for length in lengths:
            scale = dict(rope_scaling=kind, rope_factor=length / n) if kind != "none" and length > n else {}
            model = GPT(dataclasses.replace(c, block_size=length, **scale)).eval().to(device)
            model.load_state_dict(plain.state_dict())
            row.append(perplexity(model(texts[:, :length])[0], length))
        rows.append(row)
    for sinks in (0, 4):
        cache, filled, kept = sampler.new_cache(plain, len(texts), n), 0, []
        for t in range(lengths[-1]):
            if filled == n:
                filled = [sampler.make_room(plain, cache, r, n, texts[r, :t].tolist(), sinks) for r in range(len(texts))][0]
                cache.set_lengths([filled] * len(texts))
            kept, filled = kept[-last + 1:] + [plain(texts[:, t:t + 1], cache=cache)[0]], filled + 1
            if t + 1 in lengths: rows.append((rows.pop() if t + 1 > n else [f"window, sinks={sinks}"]) + [perplexity(torch.cat(kept, 1), t + 1)])
    table(["perplexity before"] + [f"{length:,} tokens" for length in lengths], rows)

# ---------------------------------------------------------------------------- evaluation

HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ARC = "https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip"
MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


def task_file(task):
    """The JSONL file of a task, downloaded and unpacked into data/eval where it has a name."""
    path = os.path.join("data", "eval", task + ".jsonl")
    if task not in ("hellaswag", "arc_easy", "arc_challenge", "mmlu"):
        if not os.path.isfile(task): raise ValueError(f"task={task!r} is none of hellaswag, arc_easy, arc_challenge, mmlu, nor a file")
        return task
    if task == "hellaswag": prepare.fetch(HELLASWAG, path)
    if os.path.exists(path): return path
    url = MMLU if task == "mmlu" else ARC
    archive = os.path.join("data", "eval", os.path.basename(url))
    prepare.fetch(url, archive)
    try:
        if task == "mmlu":
            with tarfile.open(archive) as tar:
                files = {m.name: tar.extractfile(m).read().decode() for m in tar if re.search(r"/test/\w+_test\.csv$", m.name)}
            lines = [json.dumps(dict(subject=os.path.basename(name)[:-9], question=q, choices=c, answer=a))
                     for name in sorted(files) for q, *c, a in csv.reader(io.StringIO(files[name], newline=""))]
        else:
            with zipfile.ZipFile(archive) as z:
                lines = [z.read(n).decode() for n in z.namelist() if n.endswith(f"/ARC-{task[4:].capitalize()}-Test.jsonl")]
    except (tarfile.TarError, zipfile.BadZipFile, ValueError) as e: raise ValueError(f"{archive} is damaged ({e}): delete it to fetch it again") from None
    prepare.write(path, lambda f: f.write("\n".join(lines).encode()))
    return path


def read_question(item):
    """
    One line of HellaSwag, ARC (AI2's or the hub's form) or MMLU -> (context, endings, index of the right one), worded as
    lm-evaluation-harness words them, without examples: {"question": "1+1?", "choices": ["1", "2"], "answer": 1}
    -> ("1+1?\nA. 1\nB. 2\nAnswer:", ["A", "B"], 1)
    """
    if "endings" in item:
        clean = lambda text: re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
        ctx = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}" if "activity_label" in item else item["ctx"]
        return clean(ctx), [clean(e) for e in item["endings"]], int(item["label"])
    if "answerKey" in item:
        stem, choices = (item["question"]["stem"], item["question"]["choices"]) if isinstance(item["question"], dict) else (item["question"], item["choices"])
        flat = choices if isinstance(choices, dict) else {key: [c[key] for c in choices] for key in ("text", "label")}
        return f"Question: {stem}\nAnswer:", flat["text"], flat["label"].index(item["answerKey"])
    letters = "ABCDEFGHIJ"[:len(item["choices"])]
    about = f"The following are multiple choice questions (with answers) about {item['subject'].replace('_', ' ')}.\n\n" if "subject" in item else ""
    answer = letters.index(item["answer"]) if isinstance(item["answer"], str) else int(item["answer"])
    return about + item["question"].strip() + "".join(f"\n{a}. {c}" for a, c in zip(letters, item["choices"])) + "\nAnswer:", list(letters), answer


def read_task(path, tok, size):
    """[(ids of the context, ids of each ending, bytes of each ending, index of the right one)]; a context too long loses its beginning."""
    questions = []
    for n, line in enumerate(sampler.read_file(path).split("\n"), 1):
        if not line.strip(): continue
        try:
            context, endings, label = read_question(json.loads(line))
            if not (context.strip() and all(e.strip() for e in endings) and 0 <= label < len(endings)): raise ValueError("empty, or no such answer")
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {n}: not a question of HellaSwag's, ARC's or MMLU's form ({type(e).__name__}: {e}): {line[:60]!r}") from None
        ids = [tok.encode(" " + e.strip()) for e in endings]
        room = size + 1 - max(map(len, ids))
        if room < 1: raise ValueError(f"{path}, line {n}: an ending of {max(map(len, ids))} tokens does not fit block_size={size}")
        questions.append((tok.encode(context.rstrip())[-room:], ids, [len(e.strip().encode()) for e in endings], label))
    if not questions: raise ValueError(f"{path} has no questions")
    return questions


@torch.inference_mode()
def score(model, questions):
    """For each question the log-probability of each of its endings, in nats: every context is read once, its endings go on from its cache."""
    device, pad = model.transformer.wte.weight.device, lambda rows: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=-1)
    rows = [(i, [context[-1]] + ending) for i, (context, endings, *_) in enumerate(questions) for ending in endings]
    tokens, past = pad([row for _, row in rows]).to(device), [len(context) - 1 for context, *_ in questions]
    longest, half = max(past) + tokens.shape[1] - 1, len(questions) // 2
    if longest > model.config.block_size and half: return score(model, questions[:half]) + score(model, questions[half:])    # one alone fits
    cache = sampler.new_cache(model, len(questions), longest)
    if max(past): model.hidden(pad([context[:-1] for context, *_ in questions]).clamp(min=0).to(device), cache)
    cache.set_lengths(past)
    cache.reorder([i for i, _ in rows])
    found = model.log_probs(model.hidden(tokens[:, :-1].clamp(min=0), cache), tokens[:, 1:]).tolist()
    return [[found.pop(0) for _ in endings] for _, endings, *_ in questions]


def evaluate_task(model, tok, task, cfg, identity, folder):
    """A row of the table: questions, accuracy and length-normalised accuracy; each question's scores are kept in eval_<task>.jsonl."""
    path = task_file(task)
    questions = read_task(path, tok, model.config.block_size)
    name = os.path.splitext(os.path.basename(path))[0]
    kept, head = os.path.join(folder, f"eval_{name}.jsonl"), json.dumps(dict(model=identity, questions=prepare.sha256(path)))
    lines = open(kept, encoding="utf-8").read().split("\n")[:-1] if os.path.exists(kept) else []         # a last line cut short is dropped
    done = [json.loads(line) for line in lines[1:]] if lines[:1] == [head] else []
    prepare.write(kept, lambda f: f.write("".join(line + "\n" for line in [head, *map(json.dumps, done)]).encode()))
    seen, start, shown = {r["question"] for r in done}, time.time(), time.time()
    todo = sorted(set(range(len(questions))) - seen, key=lambda i: -len(questions[i][0]))                # equal lengths together, long ones first
    if seen: print(f"{name}: going on, {len(seen):,} of {len(questions):,} questions are answered in {kept}")
    with open(kept, "a", encoding="utf-8") as f:
        for at in range(0, len(todo), cfg.batch_size):
            batch = todo[at:at + cfg.batch_size]
            for i, scores in zip(batch, score(model, [questions[i] for i in batch])):
                _, _, sizes, label = questions[i]
                best = [max(range(len(scores)), key=lambda j: values[j]) for values in (scores, [s / n for s, n in zip(scores, sizes)])]
                done.append(dict(question=i, scores=scores, acc=int(best[0] == label), acc_norm=int(best[1] == label)))
                f.write(json.dumps(done[-1]) + "\n")
            f.flush()
            rate = (at + len(batch)) / (time.time() - start)
            if time.time() - shown > 5:
                shown = time.time()
                print(f"{name}: {len(done):,} of {len(questions):,}, {rate:.1f} questions/s, {trainer.clock((len(questions) - len(done)) / rate)} left",
                      file=sys.stderr, flush=True)
    n, chance = len(done), statistics.mean(1 / len(q[1]) for q in questions)
    error = lambda p: math.sqrt(p * (1 - p) / max(n - 1, 1))
    acc = [sum(r[key] for r in done) / n for key in ("acc", "acc_norm")]
    return [name, n, *(f"{p:.2%} +- {error(p):.2%}" for p in acc), f"{chance:.2%}"]


@torch.inference_mode()
def text_loss(model, tok, text, batch_size, stride):
    """
    (nats, tokens, bytes) of a text under the model: windows of block_size tokens advance by `stride`, and each scores what the one before
    has not. The first token follows an end-of-text; where the tokenizer has none, it is given and not scored.
    """
    size, begin, ids = model.config.block_size, sampler.first_token(tok), tok.encode(text)
    given = 0 if begin else len(tok.decode_bytes(ids[:1]))
    ids, nats, device = torch.tensor(begin + ids), 0.0, model.transformer.wte.weight.device
    T, n = min(size, len(ids) - 1), len(ids) - 1
    if n < 1: raise ValueError("nothing to score: give a longer text")
    ends, add = torch.tensor([0, T, *range(T + stride, n, stride)] + [n] * (n > T)), prepare.progress("text", len(text.encode()))
    for before, end in zip(ends[:-1].split(batch_size), ends[1:].split(batch_size)):
        at = end[:, None] - T + torch.arange(T + 1)                                             # (B, T + 1)
        y = ids[at[:, 1:]].masked_fill(at[:, 1:] <= before[:, None], -1)
        x, y = model.hidden(ids[at[:, :-1]].to(device)), y.to(device)
        nats -= sum(model.log_probs(*row).item() for row in zip(x.split(1), y.split(1)))        # a row at a time: its logits are large
        add(len(text.encode()) * len(end) // (len(ends) - 1))
    return nats, n, len(text.encode()) - given


def bench_eval(argv):
    """A checkpoint (--out_dir), or others' weights (--init_from), on texts (--input) and multiple-choice tasks (--task)."""
    cfg = config.load(argv)
    if not (cfg.input or cfg.task): raise ValueError("say what to evaluate on: --input=FILE for text, --task=hellaswag or a .jsonl file for questions")
    model, tok, about = sampler.load(dataclasses.replace(cfg, compile=True))       # compile: without the packing, which only sampling understands
    stride = cfg.stride or max(model.config.block_size // 2, 1)
    if stride > model.config.block_size: raise ValueError(f"stride={stride} is longer than block_size={model.config.block_size}: tokens would be left out")
    print(f"{about} | {model.set_backend(training=False)}")
    rows = []
    for path in filter(None, cfg.input.split(",")):
        nats, tokens, size = text_loss(model, tok, sampler.read_file(path), cfg.batch_size, stride)
        rows.append([path, size, tokens, f"{nats / tokens:.4f}", math.exp(nats / tokens), f"{nats / math.log(2) / size:.4f}"])
    if rows: table(["text", "bytes", "tokens", "nats per token", "perplexity", "bits per byte"], rows)
    digest = hashlib.sha256(repr((model.config, tok.hash)).encode())
    for p in model.state_dict().values(): digest.update(p.cpu().contiguous().view(torch.uint8).numpy())
    folder = about.split(" | ")[0]
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)      # scores are kept beside the weights
    rows = [evaluate_task(model, tok, task, cfg, digest.hexdigest(), folder) for task in filter(None, cfg.task.split(","))]
    if rows: table(["task", "questions", "acc", "acc_norm", "chance"], rows)

# ---------------------------------------------------------------------------- the command line

COMMANDS = {"eval": bench_eval, "attention": bench_attention, "tokenizer": bench_tokenizer, "sample": bench_sample, "context": bench_context, "train": bench_train,
            "size": bench_size, "plot": bench_plot, "scaling": bench_scaling}


def main(argv):
    if argv[:1] == ["tokenizer-contender"]: return tokenizer_contender(*argv[1:])       # started by bench_tokenizer
    if not argv or argv[0] not in COMMANDS:
        print(__doc__.strip())
        if argv and argv[0] not in ("-h", "--help"): raise ValueError(f"unknown benchmark {argv[0]!r}: choose {', '.join(COMMANDS)}")
        return
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    config.run(main, parse=list)
