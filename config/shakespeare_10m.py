# nanoGPT's 6-layer, 384-wide, 256-context Shakespeare model, for a GPU.
dataset = "shakespeare"
out_dir = "out/shakespeare_10m"
vocab_size = 2048
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
batch_size, max_iters = 64, 1000
