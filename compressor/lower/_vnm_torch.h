/* The kernels as operators of torch, without Python on the way: what a compiled model calls between its own kernels, when Python's code
 * and data have left the caches, takes several times as long as what is in them.
 *
 * torch's stable C functions are found by name in the library that is loaded (vnm_kernels.py), so that no header of torch is needed
 * to build this, and no version of it is built in.
 */

typedef uint64_t value; /* of an operator's stack: a tensor, which is ours to give back, or the bits of a number */

static struct {
    int32_t (*data)(void *, void **), (*dims)(void *, int64_t *), (*sizes)(void *, int64_t **), (*strides)(void *, int64_t **);
    int32_t (*dtype)(void *, int32_t *), (*device)(void *, int32_t *), (*give_back)(void *), (*threads)(uint32_t *);
    int32_t (*make)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, void **);
    int32_t (*library)(const char *, const char *, const char *, uint32_t, void **);
    int32_t (*implement)(void *, const char *, void (*)(value *, uint64_t, uint64_t));
    int32_t (*float32)(void), (*bfloat16)(void), (*cpu)(void);
    void (*raise)(const char *); /* a C++ exception, which passes through the functions below */
} torch;
enum { TORCH = sizeof torch / sizeof(void *) };

enum { DIMS = 8 };

/* A tensor on the CPU. */
typedef struct {
    void *data;
    int64_t dims, entries, sizes[DIMS], strides[DIMS];
    int32_t dtype;
    int together; /* whether its entries follow each other */
} tensor;

static int read_tensor(value handle, tensor *t) {
    void *of = (void *)(uintptr_t)handle;
    int64_t *sizes, *strides;
    int32_t device;
    if (torch.data(of, &t->data) || torch.dims(of, &t->dims) || torch.sizes(of, &sizes) || torch.strides(of, &strides) ||
        torch.dtype(of, &t->dtype) || torch.device(of, &device) || device != torch.cpu() || t->dims < 1 || t->dims > DIMS)
        return 0;
    t->entries = t->together = 1;
    for (int64_t i = t->dims - 1; i >= 0; i--) {
        t->sizes[i] = sizes[i], t->strides[i] = strides[i];
        t->together &= sizes[i] == 1 || strides[i] == t->entries;
        t->entries *= sizes[i];
    }
    t->together |= t->entries == 0;
    return 1;
}

/* A new one. */
static int make_tensor(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t dtype, value *handle, void **data) {
    void *made;
    if (torch.make(dims, sizes, strides, dtype, torch.cpu(), 0, &made))
        return 0;
    *handle = (value)(uintptr_t)made;
    return torch.data(made, data) == 0;
}

/* The same whose entries follow each other. */
static int make_alike(int64_t dims, const int64_t *sizes, int32_t dtype, value *handle, void **data) {
    int64_t strides[DIMS], entries = 1;
    for (int64_t i = dims - 1; i >= 0; i--) strides[i] = entries, entries *= sizes[i] > 1 ? sizes[i] : 1; /* as torch has them */
    return make_tensor(dims, sizes, strides, dtype, handle, data);
}

/* A weight in one buffer, as vnm_weight.py lays it out: numbers of 64 bits, and what they say lies where, in bytes. */
enum { PACKED = 0x314d4e56, UNCAST = 0x7f800001, NUMBERS = 24, PARTS = 6, LINE = 64 };

static const char *weight_of(value handle, const level *how, matrix *m, int *vectors) {
    static const char *const other = "a packed weight is not as its numbers say. Lower the dense model again.";
    static const char *const moved = "a lowered model was cast or moved. Lower the dense model again instead.";
    tensor t;
    if (!read_tensor(handle, &t) || t.dtype != torch.float32() || !t.together || t.entries < 2 * NUMBERS)
        return moved;
    const int64_t *n = t.data, size = 4 * t.entries, *at = n + 13;
    const char *base = t.data;
    if (n[0] != PACKED || n[1] != size)
        return other;
    if (at[PARTS] != UNCAST) /* a cast there and back */
        return moved;
    for (int i = 2; i < 13; i++)
        if (n[i] < 0 || n[i] > INT32_MAX)
            return other;
    *m = (matrix){.rows = (int)n[2], .inner = (int)n[3], .v = (int)n[4], .taps = (int)n[5], .block = (int)n[6], .group = (int)n[7],
                  .kept = (int)n[8], .planes = (int)n[9], .lanes = (int)n[10], .largest = (int)n[11], .values = base + at[0],
                  .index = (const uint16_t *)(base + at[1]), .bias = at[2] ? (const float *)(base + at[2]) : NULL,
                  .order = at[3] ? (const int32_t *)(base + at[3]) : NULL, .scale = at[4] ? (const float *)(base + at[4]) : NULL,
                  .total = at[5] ? (const int32_t *)(base + at[5]) : NULL};
    *vectors = (int)n[12];
    const char *fault = wrong(m, how);
    if (fault != NULL)
        return fault;
    int whole = m->inner / m->block, left = m->inner % m->block;
    size_t steps = ((size_t)whole * steps_of(m, m->block) + (left ? steps_of(m, left) : 0)) * m->taps * (m->rows / m->v);
    size_t rows = 4 * (size_t)m->rows, bytes[PARTS] = {lanes_of(m, steps) * m->v * 4, steps * 2, rows, rows, rows, rows * (whole + (left > 0) + 1)};
    size_t place = NUMBERS * 8; /* one part follows the other */
    for (int i = 0; i < PARTS; i++) {
        if (at[i] != 0 || i < 2) {
            if ((size_t)at[i] != place)
                return other;
            place = (place + bytes[i] + LINE - 1) / LINE * LINE;
        }
    }
    return place == (size_t)size ? NULL : other;
}

static const char *const no_memory = "no memory for a lowered layer";

/* Gives `count` arguments back, and then leaves `result` in their place, or raises what is wrong. */
static void done(value *stack, int count, value result, const char *fault) {
    for (int i = 0; i < count; i++) torch.give_back((void *)(uintptr_t)stack[i]);
    if (fault != NULL && result)
        torch.give_back((void *)(uintptr_t)result);
    if (fault != NULL)
        torch.raise(fault);
    stack[0] = result;
}

/* Whether x is what a layer with so many channels in its dim `dim` takes, of `dims` or, with 0, any number of them. */
static const char *input_of(value handle, int dims, int dim, const matrix *m, tensor *x) {
    if (!read_tensor(handle, x) || (x->dtype != torch.float32() && x->dtype != torch.bfloat16()) || !x->together ||
        (dims && x->dims != dims) || x->sizes[dim < 0 ? x->dims + dim : dim] != m->inner)
        return "a compiled lowered layer got an input of another dtype, number of channels or layout. Lower the model again for other "
               "inputs: compressor.lower(model, example_inputs, dtype=...).";
    return NULL;
}

/* Runs a job of these matrices whose result is made as `sizes` say. */
static const char *run_direct(job *j, int matrices, const level *how, tensor *x, const int64_t *sizes, value *result) {
    uint32_t threads = 1;
    j->x = x->data, j->half = x->dtype == torch.bfloat16();
    if (torch.threads(&threads) || !make_alike(x->dims, sizes, x->dtype, result, &j->y))
        return no_memory;
    for (int i = 0; i < x->dims; i++)
        if (sizes[i] == 0)
            return NULL;
    const char *fault = wrong_job(j, matrices, (int)threads);
    if (fault != NULL)
        return fault;
    return run(j, parallel != NULL ? (int)threads : 1, how) ? no_memory : NULL;
}

/* vnm_linear_direct(x, weight, out), or of two weights vnm_pair_direct(x, first, second, out, tanh) */
static void tokens_direct(value *stack, int matrices) {
    const level *how = chosen; /* once: another thread may change it */
    job j = {.kind = matrices - 1, .side = 1, .step = 1, .height = 1, .width = 1, .tanh_form = matrices == 2 && (stack[4] & 1)};
    tensor x;
    value result = 0;
    const char *fault = weight_of(stack[1], how, &j.first, &j.vectors);
    if (fault == NULL && matrices == 2)
        fault = weight_of(stack[2], how, &j.second, &j.vectors);
    if (fault == NULL)
        fault = input_of(stack[0], 0, -1, &j.first, &x);
    if (fault == NULL) {
        j.tokens = x.entries / j.first.inner;
        x.sizes[x.dims - 1] = (matrices == 2 ? &j.second : &j.first)->rows;
        fault = x.sizes[x.dims - 1] != (int64_t)stack[matrices + 1] ? "a packed weight has other rows" : run_direct(&j, matrices, how, &x, x.sizes, &result);
    }
    done(stack, matrices + 1, result, fault);
}
static void linear_direct(value *stack, uint64_t in, uint64_t out) { (void)in, (void)out, tokens_direct(stack, 1); }
static void pair_direct(value *stack, uint64_t in, uint64_t out) { (void)in, (void)out, tokens_direct(stack, 2); }

/* vnm_conv_direct(x, weight, largest, out, side, stride, padding); `largest` is not read where the weight is of floats */
static void conv_direct(value *stack, uint64_t in, uint64_t out) {
    (void)in, (void)out;
    const level *how = chosen; /* once: another thread may change it */
    job j = {.kind = 2};
    tensor x, largest;
    value result = 0;
    const char *fault = weight_of(stack[1], how, &j.first, &j.vectors);
    if (fault == NULL)
        fault = input_of(stack[0], 4, 1, &j.first, &x);
    for (int i = 4; i < 7 && fault == NULL; i++)
        if (stack[i] > LARGEST)
            fault = "a kernel with such steps or padding has no job";
    if (fault == NULL && whole_numbers(&j.first)) {
        int64_t ends = (j.first.lanes == BYTES ? 2 : 1) * x.sizes[0];
        if (!read_tensor(stack[2], &largest) || largest.dtype != torch.float32() || !largest.together || largest.entries != ends)
            fault = "a convolution in few bits needs the largest numbers of each image";
        j.largest = largest.data;
    }
    if (fault == NULL) {
        j.side = (int)stack[4], j.step = (int)stack[5], j.padding = (int)stack[6];
        j.tokens = x.sizes[0];
        if (!within(j.step, j.side) || j.padding >= j.side || !within(j.side, 7) || x.sizes[2] > LARGEST_IMAGE || x.sizes[3] > LARGEST_IMAGE)
            fault = "a kernel with such steps or padding has no job";
    }
    if (fault == NULL) {
        j.height = (int)x.sizes[2], j.width = (int)x.sizes[3];
        j.out_height = places_along(&j, j.height), j.out_width = places_along(&j, j.width);
        int64_t sizes[4] = {x.sizes[0], j.first.rows, j.out_height, j.out_width};
        if (j.out_height < 1 || j.out_width < 1)
            fault = "a lowered convolution got fewer pixels than its kernel has";
        else
            fault = j.first.rows != (int64_t)stack[3] ? "a packed weight has other rows" : run_direct(&j, 1, how, &x, sizes, &result);
    }
    done(stack, 3, result, fault);
}

/* attention_direct(query, key, value, scale, lanes) */
static void attention_direct(value *stack, uint64_t in, uint64_t out) {
    (void)in, (void)out;
    const level *how = chosen; /* once: another thread may change it */
    attention a = {.block = KEYS, .lanes = (int)(stack[4] <= BYTES ? stack[4] : HALVES)};
    tensor t[3];
    double scale;
    uint32_t threads = 1;
    value result = 0;
    const char *fault = torch.threads(&threads) ? no_memory : NULL;
    for (int i = 0; i < 3 && fault == NULL; i++)
        if (!read_tensor(stack[i], &t[i]) || t[i].dims != 4 || t[i].dtype != torch.float32() || (t[i].strides[3] != 1 && t[i].sizes[3] != 1) ||
            t[i].sizes[0] != t[0].sizes[0] || t[i].sizes[1] != t[0].sizes[1] || t[i].sizes[2] != t[i ? 1 : 0].sizes[2] ||
            (i == 1 && t[i].sizes[3] != t[0].sizes[3]))
            fault = "compiled attention got queries, keys or values of another dtype, shape or layout. Lower the model again for other inputs.";
    memcpy(&scale, &stack[3], sizeof scale);
    if (fault == NULL) {
        a.q = t[0].data, a.k = t[1].data, a.v = t[2].data, a.scale = (float)scale;
        a.images = t[0].sizes[0], a.heads = t[0].sizes[1];
        for (int i = 0; i < 3; i++) a.q_at[i] = t[0].strides[i], a.k_at[i] = t[1].strides[i], a.v_at[i] = t[2].strides[i];
        fault = wrong_attention(&a, t[0].sizes[2], t[1].sizes[2], t[0].sizes[3], t[2].sizes[3], (int)threads, how);
    }
    if (fault == NULL) {
        int64_t wide = a.value_channels, sizes[4] = {a.images, a.heads, a.queries, wide};
        int64_t strides[4] = {a.queries * a.heads * wide, wide, a.heads * wide, 1};
        void *y;
        fault = no_memory;
        if (make_tensor(4, sizes, strides, t[0].dtype, &result, &y)) {
            a.y = y;
            fault = attend(&a, parallel != NULL ? (int)threads : 1, how) ? no_memory : NULL;
        }
    }
    done(stack, 3, result, fault);
}

static const struct {
    const char *name;
    void (*function)(value *, uint64_t, uint64_t);
} direct[] = {{"vnm_linear_direct", linear_direct}, {"vnm_pair_direct", pair_direct}, {"vnm_conv_direct", conv_direct}, {"attention_direct", attention_direct}};

/* Registers them, once; whether they are. */
static int serve(void *const *functions) {
    static void *library; /* for as long as the process lives */
    static int all;
    if (library != NULL)
        return all;
    memcpy(&torch, functions, sizeof torch);
    if (torch.library("compressor", "CPU", __FILE__, __LINE__, &library) || library == NULL)
        return 0;
    for (size_t i = 0; i < sizeof direct / sizeof *direct; i++)
        if (torch.implement(library, direct[i].name, direct[i].function))
            return 0;
    return all = 1;
}
