/* Products with V:N:M weights on CPUs: Linear, Linear-GELU-Linear, and convolutions, fp32 and bf16, also with
 * weights of 8 or 7 bits; and attention.
 *
 * A Python module without Python objects in its hot path: addresses and sizes in, nothing out. compressor/lower/vnm.py packs
 * the weights, checks the arguments and makes operators of these functions; nothing else should call them.
 *
 * Threads are those of the OpenMP runtime that torch has loaded: its GOMP_parallel is handed over as an address, so that no
 * second runtime comes into the process, whatever its file is called.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALONE __attribute__((noinline)) /* so that it is compiled once */
#define UNROLL _Pragma("GCC unroll 16")
#define CHUNK 512 /* rows of output between two transpositions: their blocks of input are read from the first-level cache */
#define HIDDEN 512 /* hidden channels of a pair at a time: they stay in the second-level cache */
#define HIDDEN_CODES 1024 /* the same of whole numbers, whose products become floats each time */
#define PLACES 64
#define MAGIC 12582912.0f /* 1.5 * 2^23: added to a number it has it in its last bits, rounded to nearest even */
#define LOG2_E 1.44269504f
/* x, x^3, ... of the probability that a normal number is below x, less a half, and of what takes its place in GELU's tanh form. */
#define ROUGH_ERF 3.97870267e-01f, -6.45544128e-02f, 8.76369110e-03f, -8.12187477e-04f, 4.77638856e-05f, -1.58882703e-06f, 2.25882055e-08f
#define ROUGH_TANH 3.97713521e-01f, -6.45966926e-02f, 8.81870862e-03f, -8.24474314e-04f, 4.89344990e-05f, -1.64072224e-06f, 2.34688270e-08f
#define LARGEST_SCORE (1 << 30) /* of attention in codes: two scores differ by 31 bits */
#define CENTRE_OF_KEYS 128 /* what their codes are above as bytes */
#define SHARES 4095.0f /* of attention: what the largest share of a value is in codes, */
#define VALUES 4095 /* and the largest value: sums of 128 products of both fit 32 bits */
#define KEYS 128 /* at a time: their scores stay in the first-level cache */
#define AHEAD 12 /* how many rows of queries, keys and values are prefetched */
#define RUN 16 /* groups of rows that one call multiplies */

typedef uint32_t __attribute__((may_alias)) lane; /* 32 bits of a panel: one fp32, or two bf16 */

/* What a lane of values and panels holds: one fp32, two bf16, two whole numbers of 16 bits. BYTES: a lane of a panel is two bytes,
 * one of values four, see micro_bytes; of attention four both. */
enum { FLOATS, HALVES, CODES, BYTES };
static const size_t HERE[1] = {0}; /* where the only tap of a matrix that is no convolution starts */
enum { LOWEST, HIGHEST, SUM, MAGNITUDE }; /* what of_lanes finds */
enum { SET = 8 }; /* BYTES: pairs of channels whose products are summed in 16 bits, in two sums of four pairs */

typedef struct {
    int rows, inner, v, taps;
    int block;  /* channels in a block of the inner dimension */
    int group;  /* channels of one group */
    int kept;   /* steps per group */
    int planes; /* panel rows per group */
    int lanes;  /* FLOATS, HALVES, CODES or BYTES */
    int largest; /* CODES: the largest code of an input; with this one no sum of products leaves 32 bits. BYTES: the bits that
                    hold a sum of four pairs, 16 or 32 */
    const void *values;
    const uint16_t *index;
    const float *bias;
    const float *scale; /* CODES, BYTES: what a code of each row stands for. It, bias and total are in the order of the result */
    const int32_t *total; /* BYTES: [block][row], the sum of a row's codes in the blocks before `block`; the last is that of all */
    const int32_t *order; /* where each row of the product goes; NULL: where it is */
} matrix;

/* What threads take part by part: each those of its own share first, which lie together, and then what is left of the others'. So a
 * thread reads most of what it wrote in the layer before: caches of another core are slow to answer. */
enum { QUEUES = 32 };
typedef struct {
    int64_t parts;
    int count;
    struct {
        _Alignas(64) int64_t taken;
    } of[QUEUES];
} queues;

static int (*number_of_thread)(void); /* the OpenMP runtime's omp_get_thread_num, or NULL */

/* The next part for this thread; -1 where none is left. */
static int64_t next_part(queues *all) {
    int own = number_of_thread != NULL ? number_of_thread() : 0;
    for (int i = 0; i < all->count; i++) {
        int which = (own + i) % all->count;
        int64_t begin = all->parts * which / all->count, end = all->parts * (which + 1) / all->count;
        if (__atomic_load_n(&all->of[which].taken, __ATOMIC_RELAXED) >= end - begin)
            continue;
        int64_t part = begin + __atomic_fetch_add(&all->of[which].taken, 1, __ATOMIC_RELAXED);
        if (part < end)
            return part;
    }
    return -1;
}

typedef struct {
    const void *x;
    void *y;
    int half; /* whether x and y are bf16; else fp32 */
    int tanh_form;
    int side, step, padding; /* of a convolution: of its kernel; between two places of it; zeros on each side of an image */
    int height, width;
    int64_t tokens; /* or images */
    const float *largest; /* for CODES the largest magnitude of each image, for BYTES the lowest and then the highest number of each */
    matrix first, second;
    int kind; /* 0 linear, 1 pair, 2 convolution */
    /* filled in here */
    int64_t tiles, per_image;
    int out_height, out_width, images_per_tile, vectors, failed;
    size_t scratch_bytes;
    queues *queues;
} job;

/* softmax(q k^T scale) v of every head of every image. `*_at`: how far apart images, heads and tokens lie. */
typedef struct {
    const float *q, *k, *v;
    float *y; /* (images, queries, heads, value_channels) */
    int64_t q_at[3], k_at[3], v_at[3];
    int64_t images, heads;
    int queries, keys, channels, value_channels;
    int lanes; /* FLOATS; CODES: it multiplies whole numbers of 16 bits; BYTES: those of queries and keys are of 8 */
    int block, largest; /* keys at a time; of whole numbers an even number, and the largest code of a query and a key */
    int64_t parts; /* of the queries of a head */
    float scale;
    int failed;
    queues *queues;
} attention;

/* One head's keys and values as its queries read them. */
typedef struct {
    lane *keys, *values;
    float *value_scale, *value_inverse, key_scale; /* for whole numbers alone */
    float *mean; /* of the keys, for bytes alone. Where some differ from it by more than a float holds, the head is not a number */
} head;

/* What a micro-kernel multiplies a panel by: `groups` groups of rows of a block of a matrix, and where their sums go. */
typedef struct {
    const uint16_t *index;
    const lane *weights;
    int steps, taps, groups, begin; /* begin: with the bias, and not with what `out` holds */
    size_t index_apart, weights_apart; /* of taps; only micro_bytes takes more than one of them */
    const size_t *tap_at; /* where their rows of the panel start */
    float *out;
    size_t out_stride;
    const int32_t *order;
    const float *bias;
} strip;

/* What whole numbers of tokens stand for: (number - zero) * scale of each of them. `b0` and `b1` are the blocks whose products are
 * summed. */
typedef struct {
    float *scale, *inverse;
    int32_t *zero; /* BYTES */
    int b0, b1;
} meaning;

/* What is known of the rows of a product. `after` less `before`: the sums of their codes in the blocks that were multiplied. */
typedef struct {
    const float *scale, *bias;
    const int32_t *before, *after;
} products;

static products products_of(const matrix *m, meaning at) {
    products p = {.scale = m->scale, .bias = m->bias};
    if (m->lanes == BYTES)
        p.before = m->total + (size_t)at.b0 * m->rows, p.after = m->total + (size_t)at.b1 * m->rows;
    return p;
}

#if !defined(__GNUC__) || defined(__clang__)
#error "these kernels are written with GCC's vector extensions and target pragmas"
#endif

/* Whether it multiplies whole numbers: then results are sums with a scale. */
static int whole_numbers(const matrix *m) { return m->lanes >= CODES; }

/* Hidden channels of a pair that exist at a time: whole blocks of the second matrix. */
static int hidden_chunk(const matrix *second) {
    int most = whole_numbers(second) ? HIDDEN_CODES : HIDDEN;
    return second->block < most ? most / second->block * second->block : second->block;
}

/* The place of V = 1, 2, 4 or 8 in tables of kernels. */
static int v_log(const matrix *m) { return m->v == 1 ? 0 : m->v == 2 ? 1 : m->v == 4 ? 2 : 3; }

/* Rows of a panel that holds all channels of a matrix. */
static size_t panel_rows(const matrix *m) { return (size_t)(m->inner / m->group * m->planes); }

/* Of a matrix of pairs: whether it is dense, and the rows of a panel for four channels. */
static int is_dense(const matrix *m) { return m->group == 2; }
static int rows_of_four(const matrix *m) { return 4 / m->group * m->planes; }

/* Vectors of tokens that a matrix takes at least: a vector of a panel of bytes is two of results. */
static int unit_of(const matrix *m) { return m->lanes == BYTES ? 2 : 1; }

/* Bytes of a lane of a panel. */
static size_t lane_bytes(const matrix *m) { return m->lanes == BYTES ? 2 : 4; }

/* Steps of a group of rows in a block of so many channels; of bytes whole sets, the last filled with zeros. */
static int steps_of(const matrix *m, int channels) {
    int steps = channels / m->group * m->kept;
    return m->lanes == BYTES ? (steps + SET - 1) / SET * SET : steps;
}

/* Where the lanes of so many steps of a row end: those of a set are what its sums begin with, and two pairs to a lane. */
static size_t lanes_of(const matrix *m, size_t steps) { return m->lanes == BYTES ? steps / SET * (1 + SET / 2) : steps; }

static pthread_key_t buffers; /* frees a thread's buffer when the thread ends */

/* A buffer that lives as long as its thread, and grows. Aligned to a cache line. */
static float *scratch_of_this_thread(size_t bytes) {
    static __thread void *buffer;
    static __thread size_t size;
    if (size < bytes) {
        free(buffer);
        size = 0;
        if (posix_memalign(&buffer, 64, bytes) != 0)
            buffer = NULL;
        else
            size = bytes;
        pthread_setspecific(buffers, buffer);
    }
    return buffer;
}

/* Keeps a product from being fused with a sum: every level shall round alike. */
#if defined(__x86_64__)
#define ROUNDED(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) __asm__("" : "+w"(x))
#else
#define ROUNDED(x) __asm__("" : "+m"(x))
#endif

/* The scales of `count` tokens in place of their largest magnitudes, and the inverse: code = x * inverse, to nearest even. */
static void scales_of(float *scale, float *inverse, int count, int codes) {
    for (int t = 0; t < count; t++) {
        float most = scale[t];
        int finite = most <= FLT_MAX; /* false for NaN: then the whole token is NaN */
        most = most < 1e-30f ? 1e-30f : most;
        scale[t] = finite ? most / (float)codes : NAN;
        inverse[t] = finite ? (float)codes / most : 0.0f;
    }
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,avx2,prefer-vector-width=512")
#define NAME(x) x##_avx512_bf16
#define WIDE
#define VNNI
#define DOT 1
#include "_vnm_body.h"
#include "_vnm_undef.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,prefer-vector-width=512")
#define NAME(x) x##_avx512_vnni
#define WIDE
#define VNNI
#define DOT 0
#include "_vnm_body.h"
#include "_vnm_undef.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,prefer-vector-width=512")
#define NAME(x) x##_avx512
#define WIDE
#define DOT 0
#define MADD(sum, a, b) ((sum) + (vi)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define MADDUBS(a, b) (vs)_mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#define HELD(x) __asm__("" : "+v"(x))
#include "_vnm_body.h"
#include "_vnm_undef.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
typedef short shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef char chars __attribute__((vector_size(32)));
typedef int ints __attribute__((vector_size(32)));
/* Sums fill the 16 registers but for four: a product takes one, so one of its factors stays in memory, which the compiler
 * would rather load once for all. */
INLINE shorts product_at(shorts a, const shorts *p) {
    shorts product;
    __asm__("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(a), "m"(*p));
    return product;
}
#define NAME(x) x##_avx2
#define HALF_AS_WIDE
#define DOT 0
#define MADD(sum, a, b) ((sum) + (vi)__builtin_ia32_pmaddwd256((shorts)(a), (shorts)(b)))
#define MADD_AT(sum, a, p) ((sum) + (vi)product_at((shorts)(a), (const shorts *)(p)))
#define MADDUBS(a, b) (vs)__builtin_ia32_pmaddubsw256((chars)(a), (chars)(b))
#define HELD(x) __asm__("" : "+x"(x))
#include "_vnm_body.h"
#include "_vnm_undef.h"
#pragma GCC pop_options

#if __GNUC__ >= 12 /* beside older ones there are assemblers that do not know these instructions (binutils before 2.36) */
#define AVX_VNNI
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define NAME(x) x##_avx_vnni
#define HALF_AS_WIDE
#define DOT 0
#define MADD(sum, a, b) (vi)__builtin_ia32_vpdpwssd_v8si((ints)(sum), (ints)(a), (ints)(b))
#define DPBUSD(sum, a, b) (vi)__builtin_ia32_vpdpbusd_v8si((ints)(sum), (ints)(a), (ints)(b))
#include "_vnm_body.h"
#include "_vnm_undef.h"
#pragma GCC pop_options
#endif
#endif

#if defined(__aarch64__) /* every such processor has NEON, with 32 registers of four floats */
/* A lane's low and high numbers on their own: narrowed once for all products of a factor, of which each is two smlal that add in
 * the sum's place. sdot would multiply four numbers of 8 bits, and inputs have 16. What GCC 12 keeps in registers: five vectors
 * of floats for four rows, but four of codes, which take two registers each; `_shape_of_work` in vnm.py cuts tiles so. */
#define NAME(x) x##_neon
#define VW 4
#define R1 12
#define R2 10
#define R4 5
#define R8 2
#define DOT 0
#define LOW(x) vmovn_s32((int32x4_t)(x))
#define HIGH(x) vshrn_n_s32((int32x4_t)(x), 16)
#define MADD(sum, a, b) (vi)vmlal_s16(vmlal_s16((int32x4_t)(sum), LOW(a), LOW(b)), HIGH(a), HIGH(b))
#include "_vnm_body.h"
#include "_vnm_undef.h"
#endif

#define NAME(x) x##_portable
#define VW 4
#define R1 6
#define R2 6
#define R4 3
#define R8 1
#define DOT 0
#include "_vnm_body.h"
#include "_vnm_undef.h"

typedef struct {
    const char *name;
    size_t (*plan)(job *, int);
    void (*work)(void *);
    void (*attend)(void *);
    int dot, vnni;
} level;

static const level levels[] = {
#if defined(__x86_64__)
    {"avx512_bf16", plan_avx512_bf16, work_avx512_bf16, attend_avx512_bf16, 1, 1},
    {"avx512_vnni", plan_avx512_vnni, work_avx512_vnni, attend_avx512_vnni, 0, 1},
    {"avx512", plan_avx512, work_avx512, attend_avx512, 0, 0},
#ifdef AVX_VNNI
    {"avx_vnni", plan_avx_vnni, work_avx_vnni, attend_avx_vnni, 0, 1},
#endif
    {"avx2", plan_avx2, work_avx2, attend_avx2, 0, 0},
#elif defined(__aarch64__)
    {"neon", plan_neon, work_neon, attend_neon, 0, 0},
#endif
    {"portable", plan_portable, work_portable, attend_portable, 0, 0},
};
enum { LEVELS = sizeof levels / sizeof *levels };

static int runs_here(const char *name) {
#if defined(__x86_64__)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(name, "avx512_bf16") == 0)
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (strcmp(name, "avx512_vnni") == 0)
        return avx512 && __builtin_cpu_supports("avx512vnni");
    if (strcmp(name, "avx512") == 0)
        return avx512;
#ifdef AVX_VNNI
    if (strcmp(name, "avx_vnni") == 0)
        return avx2 && __builtin_cpu_supports("avxvnni");
#endif
    if (strcmp(name, "avx2") == 0)
        return avx2;
#elif defined(__aarch64__)
    if (strcmp(name, "neon") == 0)
        return 1;
#endif
    return strcmp(name, "portable") == 0;
}

static const level *chosen;
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* torch's GOMP_parallel, or NULL */

/* `parts` parts of some work, on no more threads than there are parts. */
static void on_threads(void (*work)(void *), void *what, queues *all, int64_t parts, int threads) {
    if (parts < threads)
        threads = (int)parts;
    all->parts = parts, all->count = threads < 1 ? 1 : threads < QUEUES ? threads : QUEUES;
    for (int i = 0; i < all->count; i++) all->of[i].taken = 0;
    if (threads > 1)
        parallel(work, what, (unsigned)threads, 0);
    else
        work(what);
}

static int run(job *j, int threads, const level *how) {
    j->scratch_bytes = how->plan(j, threads);
    queues all;
    j->queues = &all, j->failed = 0;
    on_threads(how->work, j, &all, j->tiles, threads);
    return j->failed;
}

static int attend(attention *a, int threads, const level *how) {
    int64_t heads = a->images * a->heads, few = (a->queries + 255) / 256;
    a->parts = heads >= 4 * threads ? 1 : (4 * threads + heads - 1) / heads < few ? (4 * threads + heads - 1) / heads : few;
    queues all;
    a->queues = &all, a->failed = 0;
    on_threads(how->attend, a, &all, heads * a->parts, threads);
    return a->failed;
}

/* Sizes up to which no product of them leaves 32 bits, or 64 with the size of an image. */
enum { LARGEST = 1 << 24, LARGEST_IMAGE = 1 << 28, MOST_CHANNELS = 1 << 16, MOST_THREADS = 1 << 12 };

static int within(int64_t x, int64_t most) { return x >= 1 && x <= most; }

/* What is wrong with the sizes of a matrix; NULL where the kernels' own arrays hold them. What its addresses hold is not looked at. */
static const char *wrong(const matrix *m, const level *how) {
    if (m->v != 1 && m->v != 2 && m->v != 4 && m->v != 8)
        return "rows that share a choice must be 1, 2, 4 or 8";
    if (!within(m->rows, LARGEST) || m->rows % m->v || !within(m->inner, LARGEST) || !within(m->taps, 49))
        return "a weight of these sizes has no kernel";
    if (!within(m->group, m->inner) || !within(m->kept, m->group) || m->planes < 1 || m->inner % m->group ||
        !within(m->block, LARGEST) || m->block % m->group)
        return "groups or blocks of these sizes have no kernel";
    if (m->lanes < FLOATS || m->lanes > BYTES || (m->lanes && (m->kept != 1 || m->inner % 4 || m->block % 4)))
        return "products of pairs take four channels at a time";
    if (m->lanes && !(m->group == 4 && m->planes == 6) && !(is_dense(m) && m->planes == 1))
        return "products of pairs take groups of four, or of two that are both kept";
    if (m->lanes == FLOATS && m->planes != m->group)
        return "a panel of floats has a row for each channel";
    if (whole_numbers(m) && (m->scale == NULL || m->largest < 1 || m->largest > INT16_MAX))
        return "weights of whole numbers need their scales";
    if (m->lanes == BYTES && m->total == NULL)
        return "weights of bytes need the sums of their codes";
    if (m->lanes == BYTES && m->largest != 16 && !(m->largest == 32 && how->vnni))
        return "weights of bytes whose sums do not fit 16 bits do not run at this level";
    if (m->values == NULL || m->index == NULL)
        return "a weight needs its values and their places";
    return m->lanes == HALVES && !how->dot ? "weights packed for bf16 products do not run at this level" : NULL;
}

/* The kernel's places along `size` pixels of an image. */
static int places_along(const job *j, int size) {
    int64_t room = (int64_t)size + 2 * j->padding - j->side;
    return room < 0 || room > INT32_MAX ? 0 : (int)(room / j->step + 1);
}

/* What is wrong with a job whose matrices are right by themselves. */
static const char *wrong_job(const job *j, int matrices, int threads) {
    const matrix *a = &j->first, *b = &j->second;
    if (j->kind < 0 || j->kind > 2 || (j->kind == 1) != (matrices == 2))
        return "no such job";
    if ((j->kind == 1 && (whole_numbers(a) || whole_numbers(b)) && a->lanes != b->lanes) || (j->kind == 2 && a->lanes == HALVES))
        return "no such job";
    if (j->kind == 2 && whole_numbers(a) && j->largest == NULL)
        return "images in whole numbers need their largest ones";
    if (j->kind == 1 && (b->inner != a->rows || a->order != NULL))
        return "the second matrix of a pair takes the rows of the first, in their order";
    if (j->kind == 1 && hidden_chunk(b) < a->rows && hidden_chunk(b) % a->v)
        return "blocks of the second matrix of a pair hold whole groups of rows of the first";
    if (a->lanes == HALVES && !j->half)
        return "weights packed for bf16 products take inputs in bf16";
    if (j->kind == 2 ? !within(j->side, 7) || j->side * j->side != a->taps : a->taps != 1 || (matrices == 2 && b->taps != 1))
        return "a weight of these kernel positions has no such job";
    if (j->kind == 2 && (!within(j->step, j->side) || j->padding < 0 || j->padding >= j->side))
        return "a kernel with such steps or padding has no job";
    int64_t area = 1, entries;
    if (j->kind == 2) {
        if (!within(j->height, LARGEST_IMAGE) || !within(j->width, LARGEST_IMAGE) || j->out_height < 1 || j->out_width < 1)
            return "images of these sizes have no kernel";
        area = (int64_t)(j->height + 2 * j->padding) * (j->width + 2 * j->padding); /* no result is larger */
        if (area > LARGEST_IMAGE)
            return "images of these sizes have no kernel";
    }
    int rows = matrices == 2 ? b->rows : a->rows, widest = a->inner > rows ? a->inner : rows;
    if (!within(j->vectors, PLACES) || !within(threads, MOST_THREADS) || j->tokens < 1 ||
        __builtin_mul_overflow(j->tokens, area * widest, &entries) || entries > INT64_MAX / 16)
        return "a job of these sizes has no kernel";
    return j->x == NULL || j->y == NULL ? "a job needs where its input and its result lie" : NULL;
}

/* What is wrong with an attention whose addresses, strides, images, heads, block and lanes are there; the rest is filled in. */
static const char *wrong_attention(attention *a, int64_t queries, int64_t keys, int64_t channels, int64_t value_channels, int threads,
                                   const level *how) {
    if (!within(a->images, LARGEST) || !within(a->heads, LARGEST) || !within(queries, LARGEST) || !within(keys, LARGEST) ||
        !within(channels, MOST_CHANNELS) || !within(value_channels, MOST_CHANNELS) || !within(threads, MOST_THREADS) ||
        !within(a->block, a->lanes != FLOATS ? 128 : MOST_CHANNELS) || (a->lanes != FLOATS && a->block % 2) ||
        (a->lanes == BYTES && channels > LARGEST_SCORE / (127 * 255)))
        return "an attention of these sizes has no kernel";
    if (a->lanes != FLOATS && a->lanes != CODES && !(a->lanes == BYTES && how->vnni))
        return "an attention of these numbers does not run at this level";
    a->queries = (int)queries, a->keys = (int)keys, a->channels = (int)channels, a->value_channels = (int)value_channels;
    double most = sqrt((double)LARGEST_SCORE / a->channels);
    a->largest = a->lanes == BYTES ? 127 : most < INT16_MAX ? (int)most : INT16_MAX;
    return NULL;
}

#include "_vnm_torch.h"

/* --- Python. Every argument is an int: an address, a size or a flag. --- */

static int64_t number(PyObject *const *arguments, int i) { return PyLong_AsLongLong(arguments[i]); }

/* One that must fit 32 bits. */
static int small(PyObject *const *arguments, int i) {
    int64_t found = number(arguments, i);
    if ((found < INT32_MIN || found > INT32_MAX) && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "a size of a job leaves 32 bits");
    return (int)found;
}

static void *address(PyObject *const *arguments, int i) { return PyLong_AsVoidPtr(arguments[i]); }

enum { MATRIX = 16 };

static matrix matrix_of(PyObject *const *a, int i) {
    return (matrix){.rows = small(a, i),
                    .inner = small(a, i + 1),
                    .v = small(a, i + 2),
                    .taps = small(a, i + 3),
                    .block = small(a, i + 4),
                    .group = small(a, i + 5),
                    .kept = small(a, i + 6),
                    .planes = small(a, i + 7),
                    .lanes = small(a, i + 8),
                    .largest = small(a, i + 9),
                    .values = address(a, i + 10),
                    .index = address(a, i + 11),
                    .bias = address(a, i + 12),
                    .order = address(a, i + 13),
                    .scale = address(a, i + 14),
                    .total = address(a, i + 15)};
}

enum { JOB = 14 };

/* run(kind, x, y, half, tanh_form, side, step, padding, height, width, tokens, vectors, threads, largest, matrix..., [matrix...]) */
static PyObject *method_run(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    (void)self;
    if (count != JOB + MATRIX && count != JOB + 2 * MATRIX) {
        PyErr_SetString(PyExc_TypeError, "run takes the numbers of a job and one or two matrices");
        return NULL;
    }
    job j = {.kind = small(a, 0),
             .x = address(a, 1),
             .y = address(a, 2),
             .half = small(a, 3),
             .tanh_form = small(a, 4),
             .side = small(a, 5),
             .step = small(a, 6),
             .padding = small(a, 7),
             .height = small(a, 8),
             .width = small(a, 9),
             .tokens = number(a, 10),
             .vectors = small(a, 11),
             .largest = address(a, 13),
             .first = matrix_of(a, JOB)};
    if (count > JOB + MATRIX)
        j.second = matrix_of(a, JOB + MATRIX);
    int threads = small(a, 12), failed;
    if (PyErr_Occurred())
        return NULL;
    if (j.step > 0 && within(j.side, 7) && j.padding >= 0 && j.padding < j.side) {
        j.out_height = places_along(&j, j.height);
        j.out_width = places_along(&j, j.width);
    }
    const level *how = chosen; /* once: another thread may change it */
    const char *fault = wrong(&j.first, how);
    if (fault == NULL && count > JOB + MATRIX)
        fault = wrong(&j.second, how);
    if (fault == NULL)
        fault = wrong_job(&j, count > JOB + MATRIX ? 2 : 1, threads);
    if (fault != NULL) {
        PyErr_SetString(PyExc_ValueError, fault);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    failed = run(&j, parallel != NULL ? threads : 1, how);
    Py_END_ALLOW_THREADS;
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

enum { ATTENTION = 23 };

/* attend(q, k, v, y, images, heads, queries, keys, channels, value_channels, block, threads, lanes, scale, three strides of each of q, k and v) */
static PyObject *method_attend(PyObject *self, PyObject *const *n, Py_ssize_t count) {
    (void)self;
    if (count != ATTENTION) {
        PyErr_SetString(PyExc_TypeError, "attend takes the numbers of an attention");
        return NULL;
    }
    attention a = {.q = address(n, 0), .k = address(n, 1), .v = address(n, 2), .y = address(n, 3),
                   .images = number(n, 4), .heads = number(n, 5), .block = small(n, 10), .lanes = small(n, 12)};
    int64_t queries = number(n, 6), keys = number(n, 7), channels = number(n, 8), value_channels = number(n, 9);
    int threads = small(n, 11), failed;
    a.scale = (float)PyFloat_AsDouble(n[13]);
    for (int i = 0; i < 3; i++) {
        a.q_at[i] = number(n, 14 + i);
        a.k_at[i] = number(n, 17 + i);
        a.v_at[i] = number(n, 20 + i);
    }
    if (PyErr_Occurred())
        return NULL;
    const level *how = chosen; /* once: another thread may change it */
    const char *fault = wrong_attention(&a, queries, keys, channels, value_channels, threads, how);
    if (fault != NULL) {
        PyErr_SetString(PyExc_ValueError, fault);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    failed = attend(&a, parallel != NULL ? threads : 1, how);
    Py_END_ALLOW_THREADS;
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *method_levels(PyObject *self, PyObject *ignored) {
    (void)self, (void)ignored;
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < LEVELS; i++) {
        if (!runs_here(levels[i].name))
            continue;
        PyObject *name = PyUnicode_FromString(levels[i].name);
        if (name == NULL || PyList_Append(names, name) != 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *method_level(PyObject *self, PyObject *ignored) {
    (void)self, (void)ignored;
    return PyUnicode_FromString(chosen->name);
}

static PyObject *method_set_level(PyObject *self, PyObject *name) {
    (void)self;
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (bytes == NULL)
        return NULL;
    const level *found = NULL;
    for (int i = 0; i < LEVELS; i++)
        if (strcmp(PyBytes_AsString(bytes), levels[i].name) == 0 && runs_here(levels[i].name))
            found = &levels[i];
    Py_DECREF(bytes);
    if (found == NULL) {
        PyErr_Format(PyExc_ValueError, "this machine has no level %R", name);
        return NULL;
    }
    chosen = found;
    Py_RETURN_NONE;
}

static PyObject *method_set_parallel(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    (void)self;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "set_parallel takes the addresses of two functions");
        return NULL;
    }
    void *run_on_threads = address(a, 0), *number = address(a, 1);
    if (PyErr_Occurred())
        return NULL;
    memcpy(&parallel, &run_on_threads, sizeof parallel);
    memcpy(&number_of_thread, &number, sizeof number_of_thread);
    Py_RETURN_NONE;
}

/* serve(torch's functions, in the order of `torch`) */
static PyObject *method_serve(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    (void)self;
    void *functions[TORCH];
    if (count != TORCH) {
        PyErr_SetString(PyExc_TypeError, "serve takes the addresses of torch's functions");
        return NULL;
    }
    for (int i = 0; i < TORCH; i++) functions[i] = address(a, i);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(serve(functions));
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))method_run, METH_FASTCALL, "Run a job."},
    {"attend", (PyCFunction)(void (*)(void))method_attend, METH_FASTCALL, "Run an attention."},
    {"serve", (PyCFunction)(void (*)(void))method_serve, METH_FASTCALL, "Become operators of torch; whether they are."},
    {"levels", method_levels, METH_NOARGS, "The instruction sets that this machine has, the best first."},
    {"level", method_level, METH_NOARGS, "The instruction set in use."},
    {"set_level", method_set_level, METH_O, "Use another instruction set; weights are packed for one."},
    {"set_parallel", (PyCFunction)(void (*)(void))method_set_parallel, METH_FASTCALL,
     "The addresses of the OpenMP runtime's GOMP_parallel and omp_get_thread_num; 0: one thread."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_vnm", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__vnm(void) {
    if (pthread_key_create(&buffers, free) != 0)
        return PyErr_NoMemory();
    for (int i = LEVELS - 1; i >= 0; i--)
        if (runs_here(levels[i].name))
            chosen = &levels[i];
    return PyModule_Create(&module);
}
