/* The kernels for one instruction set. _vnm.c includes this file once per set, with
 *   NAME(x)  the set's name for a function        VW      floats in a vector
 *   R2 R4 R8 vectors of tokens that a micro-kernel holds for V = 2, 4, 8 rows (R1: also one row)
 *   DOT      1 where _mm512_dpbf16_ps exists
 *   MADD     (sum, a, b): sum + a0 b0 + a1 b1 of lanes of two 16-bit numbers; plain C where it is not defined
 *   MADD_AT  the same with the address of b, where sums alone may fill the registers
 *   MADDUBS  (a, b): a0 b0 + a1 b1 of lanes of two bytes, those of b signed, where that fits 16 bits; plain C where it is not defined
 *   DPBUSD   (sum, a, b): sum + a0 b0 + .. + a3 b3 of lanes of four bytes; MADDUBS and MADD where it is not defined
 *   PACKED   (c): the lanes of four vectors as bytes, four lanes of each in turn; plain C where it is not defined
 *   MOST     (a, b): the larger of lanes of whole numbers; plain C where it is not defined
 *   HELD     a vector that is made now, and stays in its register
 *   WIDE     in place of VW, R1 to R8 and the larger and smaller of lanes: those of AVX-512; VNNI: its MADD and DPBUSD
 *   HALF_AS_WIDE  the same of AVX2
 *
 * Everything works on tiles of a few vectors of tokens (or pixels). A tile's input lies in a panel [K][stride], one row
 * per input channel, so that a kept channel is a row pointer, and V rows of output share every load. With DOT a panel row
 * holds pairs, of bf16 or of whole numbers: six rows per group of four channels, one for each pair that 2:4 may keep; of a dense weight,
 * whose groups are of two channels that are both kept, one row per group.
 *
 * With BYTES numbers of an input are whole ones from 0 to 255, of which `zero` is nothing: (code - zero) * scale. Sums are of codes
 * less CENTRE, so that 16 bits hold more of them.
 */

#ifdef WIDE /* what the levels of AVX-512 have in common */
#define VW 16
#define R1 12
#define R2 12
#define R4 6
#define R8 3
#define MAX(a, b) (vf)_mm512_max_ps((__m512)(a), (__m512)(b))
#define MOST(a, b) (vi)_mm512_max_epi32((__m512i)(a), (__m512i)(b))
#define PACKED(c) (vu)_mm512_packus_epi16(_mm512_packus_epi32((__m512i)(c)[0], (__m512i)(c)[1]), _mm512_packus_epi32((__m512i)(c)[2], (__m512i)(c)[3]))
#define MIN(a, b) (vf)_mm512_min_ps((__m512)(a), (__m512)(b))
#endif
#ifdef HALF_AS_WIDE
#define VW 8
#define R1 6
#define R2 6
#define R4 3
#define R8 1
#define MAX(a, b) (vf)_mm256_max_ps((__m256)(a), (__m256)(b))
#define MOST(a, b) (vi)__builtin_ia32_pmaxsd256((ints)(a), (ints)(b))
#define PACKED(c) (vu)__builtin_ia32_packuswb256(__builtin_ia32_packusdw256((ints)(c)[0], (ints)(c)[1]), __builtin_ia32_packusdw256((ints)(c)[2], (ints)(c)[3]))
#define MIN(a, b) (vf)_mm256_min_ps((__m256)(a), (__m256)(b))
#endif
#ifdef VNNI
#define MADD(sum, a, b) (vi)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#define DPBUSD(sum, a, b) (vi)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#endif

typedef float NAME(vf) __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef int32_t NAME(vi) __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef uint32_t NAME(vu) __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef uint16_t NAME(vh) __attribute__((vector_size(2 * VW), aligned(2), may_alias));
typedef uint8_t NAME(vb) __attribute__((vector_size(VW), aligned(1), may_alias));
typedef int16_t NAME(vs) __attribute__((vector_size(4 * VW), aligned(2), may_alias));
typedef uint16_t NAME(vus) __attribute__((vector_size(4 * VW), aligned(2), may_alias));
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
#define vh NAME(vh)
#define vb NAME(vb)
#define vs NAME(vs)
#define vus NAME(vus)

INLINE vf NAME(load)(const float *p) { return *(const vf *)p; }
INLINE void NAME(store)(float *p, vf x) { *(vf *)p = x; }
INLINE vf NAME(all)(float x) { return x - (vf){0}; }
INLINE vu NAME(widen)(const uint16_t *p) { return __builtin_convertvector(*(const vh *)p, vu); }

/* fp32 -> bf16 in the low half of each lane, to nearest even, NaN kept. */
INLINE vu NAME(round16)(vf x) {
#if DOT
    return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vi is_nan = x != x;
    return ((vu)is_nan & 0x7fc0) | (~(vu)is_nan & rounded);
}

#ifndef MADD
INLINE vi NAME(madd)(vi sum, vi a, vi b) {
    vi low_a = (vi)((vu)a << 16) >> 16, low_b = (vi)((vu)b << 16) >> 16;
    return sum + low_a * low_b + (a >> 16) * (b >> 16);
}
#define MADD(sum, a, b) NAME(madd)(sum, a, b)
#endif

#ifndef MOST
INLINE vi NAME(most_of)(vi a, vi b) {
    vi above = a > b;
    return (a & above) | (b & ~above);
}
#define MOST(a, b) NAME(most_of)(a, b)
#endif

#ifndef MADDUBS
INLINE vs NAME(maddubs)(vs a, vs b) {
    return (a & 0xff) * ((vs)((vus)b << 8) >> 8) + (vs)((vus)a >> 8) * (b >> 8);
}
#define MADDUBS(a, b) NAME(maddubs)(a, b)
#endif
#ifndef HELD
#define HELD(x)
#endif
#ifdef DPBUSD
#define CENTRE 0
#else
#define CENTRE 128
#endif

#ifndef PACKED
INLINE vu NAME(packed)(const vu c[4]) {
    vu found;
    UNROLL for (int i = 0; i < 4; i++) {
        vb narrow = __builtin_convertvector(c[i], vb);
        memcpy((char *)&found + i * VW, &narrow, VW);
    }
    return found;
}
#define PACKED(c) NAME(packed)(c)
#endif

/* fp32 -> a whole number of 16 bits in the low half of each lane, to nearest even. */
INLINE vu NAME(code)(vf x, vf inverse) {
    vf scaled = x * inverse;
    ROUNDED(scaled);
    return (vu)(scaled + MAGIC) & 0xffff;
}

INLINE vf NAME(larger)(vf largest, vf x) { /* of magnitudes, as whole numbers: NaN is the largest of all */
    return (vf)MOST((vi)largest, (vi)x & INT32_MAX);
}

/* Of the lanes of what `larger` gave. */
INLINE float NAME(largest_of)(vf most) {
    int32_t largest = 0;
    for (int i = 0; i < VW; i++) largest = ((vi)most)[i] > largest ? ((vi)most)[i] : largest;
    float found;
    memcpy(&found, &largest, sizeof found);
    return found;
}

/* VW x VW entries in place: log2(VW) rounds of exchanging blocks. */
#define EXCHANGE(D)                                                                                                     \
    if (D < VW)                                                                                                         \
        UNROLL for (int i = 0; i < VW; i++) if (!(i & D)) {                                           \
            vi low, high;                                                                                               \
            UNROLL for (int j = 0; j < VW; j++) {                                                     \
                low[j] = j & D ? VW + j - D : j;                                                                        \
                high[j] = j & D ? VW + j : j + D;                                                                       \
            }                                                                                                           \
            vu a = r[i], b = r[i + (D < VW ? D : 0)];                                                                   \
            r[i] = __builtin_shuffle(a, b, low);                                                                        \
            r[i + (D < VW ? D : 0)] = __builtin_shuffle(a, b, high);                                                    \
        }
INLINE void NAME(transpose)(vu r[VW]) {
    EXCHANGE(1)
    EXCHANGE(2)
    EXCHANGE(4)
    EXCHANGE(8)
}

/* The larger, the smaller; b where one is NaN. */
INLINE vf NAME(max)(vf a, vf b) {
#ifdef MAX
    return MAX(a, b);
#endif
    vi above = a > b;
    return (vf)(((vi)a & above) | ((vi)b & ~above));
}
INLINE vf NAME(min)(vf a, vf b) {
#ifdef MIN
    return MIN(a, b);
#endif
    vi below = a < b;
    return (vf)(((vi)a & below) | ((vi)b & ~below));
}
INLINE vf NAME(clamp)(vf x, float low, float high) { return NAME(max)(NAME(all)(low), NAME(min)(NAME(all)(high), x)); }

/* What each of VW vectors has in its lanes: their lowest, their highest, their sum, or the largest of what `larger` gave. They are
 * lost. */
INLINE vf NAME(of_lanes)(int what, vu r[VW]) {
    NAME(transpose)(r);
    vf found = (vf)r[0];
    UNROLL for (int i = 1; i < VW; i++) {
        vf x = (vf)r[i];
        if (what == LOWEST)
            found = NAME(min)(found, x);
        else if (what == HIGHEST)
            found = NAME(max)(found, x);
        else if (what == SUM)
            found += x;
        else
            found = NAME(larger)(found, x);
    }
    return found;
}

/* erf(x) = x P(x^2) / Q(x^2), a least-squares fit in [-3.92, 3.92]; beyond it erf is +-1 in fp32. Relative error < 2e-7. */
INLINE vf NAME(erf)(vf x) {
    vi far = (x < -3.92f) | (x > 3.92f);
    x = NAME(clamp)(x, -3.92f, 3.92f);
    vf z = x * x;
    vf p = 1.128379146e0f + z * (1.904066717e-1f + z * (5.274875630e-2f + z * (3.765627823e-3f + z * (2.848833318e-4f + z * 2.050090176e-6f))));
    vf q = 1.0f + z * (5.020762600e-1f + z * (1.141092022e-1f + z * (1.496923747e-2f + z * (1.162538856e-3f + z * 3.809177732e-5f))));
    vi one = (vi)NAME(all)(1.0f) | ((vi)x & INT32_MIN); /* with the sign of x */
    return (vf)((one & far) | ((vi)NAME(clamp)(x * p / q, -1.0f, 1.0f) & ~far));
}

/* exp(x) = 2^k e^f with |f| <= ln(2) / 2; x is clamped to where fp32 has normal numbers. */
INLINE vf NAME(exp)(vf x) {
    x = NAME(clamp)(x, -87.0f, 88.0f);
    vf shifted = x * 1.44269504f + MAGIC, k = shifted - MAGIC;
    vf f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    vf e = 1.0f + f * (1.0f + f * (0.5f + f * (1.66666667e-1f + f * (4.16666667e-2f + f * (8.33333333e-3f + f * 1.38888889e-3f)))));
    vi power = ((vi)shifted << 23) + 0x3f800000; /* k is in the last bits of `shifted` */
    return e * (vf)power;
}

/* 2^x = 2^k 2^f with |f| <= 1/2, for x <= 0; what is below 2^-126 counts as that. Relative error < 1e-7. */
INLINE vf NAME(power)(vf x) {
    x = NAME(max)(NAME(all)(-126.0f), x);
    vf shifted = x + MAGIC, f = x - (shifted - MAGIC);
    vf e = 1.0f + f * (6.93147206e-1f + f * (2.40226469e-1f + f * (5.55032878e-2f + f * (9.61848896e-3f + f * (1.33999314e-3f + f * 1.53458120e-4f)))));
    return e * (vf)(((vi)shifted << 23) + 0x3f800000);
}

/* SHARES * 2^x, for x <= 0 and nothing that is not a number, to a relative 1e-4. */
INLINE vf NAME(share)(vf x) {
    x = NAME(max)(x, NAME(all)(-40.0f));
    vf shifted = x + MAGIC, f = x - (shifted - MAGIC);
    vf e = SHARES * 9.9992807e-1f + f * (SHARES * 6.9326099e-1f + f * (SHARES * 2.4261113e-1f + f * (SHARES * 5.517167e-2f)));
    return (vf)((vi)e + ((vi)shifted << 23));
}

INLINE vf NAME(gelu)(vf x, int tanh_form) {
    if (!tanh_form)
        return 0.5f * x * (1.0f + NAME(erf)(x * 0.70710678f));
    vf u = 1.59576912f * (x + 0.044715f * x * x * x); /* 2 sqrt(2 / pi) (...): x sigmoid(u) */
    /* below -30 the product is zero in fp32; the clamped exponential would not make it so */
    return (vf)((vi)(x / (1.0f + NAME(exp)(-u))) & ~(x < -30.0f));
}

/* The same to 2.2e-4 or 4e-7 of x, for what becomes whole numbers: x times an odd polynomial that is 1/2 from 4 on, + 1/2; what is
 * below -4 counts as that. Products are not fused with sums, so that every level gives the same. */
INLINE vf NAME(rough_gelu)(vf x, int tanh_form) {
    static const float terms[2][7] = {{ROUGH_ERF}, {ROUGH_TANH}};
    const float *term = terms[tanh_form != 0];
    x = NAME(max)(NAME(all)(-4.0f), x);
    vf near = NAME(min)(NAME(all)(4.0f), x), z = near * near, p = NAME(all)(term[6]);
    UNROLL for (int i = 5; i >= 0; i--) {
        p *= z;
        ROUNDED(p);
        p += term[i];
    }
    p *= near;
    ROUNDED(p);
    p = x * (p + 0.5f);
    ROUNDED(p);
    return p;
}

/* out[v][r] (+)= sum over steps of w[s][v] * panel[index[s]][r], for V rows and R vectors, group of rows by group. `gaps` says
 * where the vectors lie in a panel row; NULL where they follow each other. w and panel hold what `dot` says; with CODES, out is
 * whole numbers. */
INLINE void NAME(micro)(int V, int R, int dot, const float *panel, size_t stride, const int *gaps, strip p) {
    const uint16_t *index = p.index;
    const lane *weights = p.weights;
    for (int g = 0; g < p.groups; g++, p.out += p.order ? 0 : V * p.out_stride) {
        float *out[8];
        vf acc[8][12];
        UNROLL for (int v = 0; v < V; v++) out[v] = p.out + (p.order ? p.order[g * V + v] : v) * p.out_stride;
        if (p.begin && dot == CODES)
            UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) acc[v][r] = (vf){0};
        else if (p.begin)
            UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
                acc[v][r] = NAME(all)(p.bias ? p.bias[g * V + v] : 0.0f);
        else
            UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) acc[v][r] = NAME(load)(out[v] + r * VW);
        for (int s = 0; s < p.steps; s++, weights += V) {
            const float *row = panel + *index++ * stride;
            __builtin_prefetch(weights + 512); /* they stream by: further than the processor looks ahead by itself */
            vf x[12];
            UNROLL for (int r = 0; r < R; r++) x[r] = NAME(load)(row + (gaps ? gaps[r] : r * VW));
            UNROLL for (int v = 0; v < V; v++) {
                vf b = (vf)(weights[v] | (vu){0});
                UNROLL for (int r = 0; r < R; r++) {
#ifdef MADD_AT
                    if (dot == CODES && r == 0 && V * R == 12)
                        acc[v][r] = (vf)MADD_AT((vi)acc[v][r], (vi)b, row + (gaps ? gaps[0] : 0));
                    else
#endif
                    if (dot == CODES)
                        acc[v][r] = (vf)MADD((vi)acc[v][r], (vi)x[r], (vi)b);
                    else
#if DOT
                    if (dot == HALVES)
                        acc[v][r] = (vf)_mm512_dpbf16_ps((__m512)acc[v][r], (__m512bh)x[r], (__m512bh)b);
                    else
#endif
                        acc[v][r] += b * x[r];
                }
            }
        }
        UNROLL for (int v = 0; v < V; v++) {
            UNROLL for (int r = 0; r < R; r++) NAME(store)(out[v] + r * VW, acc[v][r]);
        }
    }
}

/* Tokens 8 i + {0 to 3} and 8 i + {4 to 7} of two rows of pairs of bytes, as lanes of both pairs. */
INLINE void NAME(both)(vs a, vs b, vs *low, vs *high) {
    vs first, second;
    UNROLL for (int j = 0; j < 2 * VW; j++) {
        first[j] = j % 2 * 2 * VW + j / 8 * 8 + j % 8 / 2;
        second[j] = first[j] + 4;
    }
    *low = __builtin_shuffle(a, b, first);
    *high = __builtin_shuffle(a, b, second);
}

/* out[v] (+)= the sums of products of bytes, of V rows and R vectors of tokens. A vector of the panel is two of sums: tokens 8 i + {0 to 3}
 * in the first, 8 i + {4 to 7} in the second, where R is odd the first alone, and zeros; the next lies `apart` from it. A lane of weights is two
 * pairs of channels; four such and their pairs of the panel are a set, whose products sum to 16 bits, since weights were rounded so that
 * they do: `w[v]` before them is -128 times the sum of the weights. */
INLINE void NAME(micro_bytes)(int V, int R, const uint16_t *panel, size_t stride, size_t apart, strip p) {
#ifndef DPBUSD
    const vs ones = (vs){0} + 1;
#endif
    const size_t lanes = (size_t)p.steps / SET * (1 + SET / 2) * V; /* of a group of rows and a tap */
    for (int g = 0; g < p.groups; g++, p.index += p.steps, p.weights += lanes, p.out += p.order ? 0 : V * p.out_stride) {
        vi *out[8];
        UNROLL for (int v = 0; v < V; v++) {
            out[v] = (vi *)(p.out + (p.order ? p.order[g * V + v] : v) * p.out_stride);
#ifndef DPBUSD
            UNROLL for (int r = 0; r < R + R % 2; r++) if (p.begin) out[v][r] = (vi){0};
#else
            UNROLL for (int r = R; r < R + R % 2; r++) if (p.begin) out[v][r] = (vi){0};
#endif
        }
#ifdef DPBUSD /* of 32 bits from the first step to the last. A vector that was just written would be long in coming back. */
        vi sums[8][4];
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) sums[v][r] = (vi){0};
        if (!p.begin)
            UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) sums[v][r] = out[v][r];
#endif
        for (int tap = 0; tap < p.taps; tap++) {
            const uint16_t *index = p.index + tap * p.index_apart, *rows = panel + (p.tap_at[tap] - p.tap_at[0]);
            const lane *w = p.weights + tap * p.weights_apart;
            for (int s = 0; s < p.steps; s += SET) {
                __builtin_prefetch(w + 512);
#ifndef DPBUSD
                vs sums[8][4];
                UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) sums[v][r] = (vs)(w[v] | (vu){0});
#endif
                w += V;
                UNROLL for (int i = 0; i < SET; i += 2, w += V) {
                    const uint16_t *first = rows + index[s + i] * stride, *second = rows + index[s + i + 1] * stride;
                    vs x[4];
                    UNROLL for (int r = 0; r < R; r += 2)
                        NAME(both)(*(const vs *)(first + r / 2 * apart), *(const vs *)(second + r / 2 * apart), &x[r], &x[r + 1]);
                    UNROLL for (int v = 0; v < V; v++) {
                        vs b = (vs)(w[v] | (vu){0});
#ifdef DPBUSD
                        UNROLL for (int r = 0; r < R; r++) sums[v][r] = DPBUSD(sums[v][r], x[r], b);
#else
                        HELD(b);
                        UNROLL for (int r = 0; r < R; r++) {
                            sums[v][r] += MADDUBS(x[r], b);
                            HELD(sums[v][r]);
                        }
#endif
                    }
                }
#ifndef DPBUSD
                UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) out[v][r] = MADD(out[v][r], (vi)sums[v][r], (vi)ones);
#endif
            }
        }
#ifdef DPBUSD
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) out[v][r] = sums[v][r];
#endif
    }
}

/* The two vectors of sums that micro_bytes gives, token by token. */
INLINE void NAME(in_order)(const float *sums, vi found[2]) {
    vi low = ((const vi *)sums)[0], high = ((const vi *)sums)[1], first, second;
    UNROLL for (int j = 0; j < VW; j++) {
        first[j] = j / 8 * 4 + j % 4 + j % 8 / 4 * VW;
        second[j] = (j + VW) / 8 * 4 + j % 4 + (j + VW) % 8 / 4 * VW;
    }
    found[0] = __builtin_shuffle(low, high, first);
    found[1] = __builtin_shuffle(low, high, second);
}

typedef void (*NAME(kernel))(const float *, size_t, const int *, const strip *);

/* One function per V, R, arithmetic and layout, so that all of these are constants in the loops above. */
#define MICRO(V, R, DOTS, GAPS, TAG)                                                                                    \
    static void NAME(micro_##V##_##R##TAG)(const float *panel, size_t stride, const int *gaps, const strip *p) {         \
        (void)gaps;                                                                                                        \
        NAME(micro)(V, R, DOTS, panel, stride, GAPS, *p);                                                               \
    }
#if DOT
#define MICROS(V, R)                                                                                                    \
    MICRO(V, R, FLOATS, NULL, _)                                                                                        \
    MICRO(V, R, FLOATS, gaps, _gaps) MICRO(V, R, HALVES, NULL, _dot) MICRO(V, R, CODES, NULL, _codes) MICRO(V, R, CODES, gaps, _codes_gaps)
#define ENTRY(V, R)                                                                                                     \
    {{NAME(micro_##V##_##R##_), NAME(micro_##V##_##R##_gaps)}, {NAME(micro_##V##_##R##_dot), NULL}, {NAME(micro_##V##_##R##_codes), NAME(micro_##V##_##R##_codes_gaps)}},
#else
#define MICROS(V, R) MICRO(V, R, FLOATS, NULL, _) MICRO(V, R, FLOATS, gaps, _gaps) MICRO(V, R, CODES, NULL, _codes) MICRO(V, R, CODES, gaps, _codes_gaps)
#define ENTRY(V, R) {{NAME(micro_##V##_##R##_), NAME(micro_##V##_##R##_gaps)}, {NULL, NULL}, {NAME(micro_##V##_##R##_codes), NAME(micro_##V##_##R##_codes_gaps)}},
#endif
#define UPTO1(M, V) M(V, 1)
#define UPTO2(M, V) UPTO1(M, V) M(V, 2)
#define UPTO3(M, V) UPTO2(M, V) M(V, 3)
#define UPTO4(M, V) UPTO3(M, V) M(V, 4)
#define UPTO5(M, V) UPTO4(M, V) M(V, 5)
#define UPTO6(M, V) UPTO4(M, V) M(V, 5) M(V, 6)
#define UPTO8(M, V) UPTO6(M, V) M(V, 7) M(V, 8)
#define UPTO10(M, V) UPTO8(M, V) M(V, 9) M(V, 10)
#define UPTO12(M, V) UPTO10(M, V) M(V, 11) M(V, 12)
#define UPTO_(R) UPTO##R
#define UPTO(R) UPTO_(R)
UPTO(R1)(MICROS, 1)
UPTO(R2)(MICROS, 2)
UPTO(R4)(MICROS, 4)
UPTO(R8)(MICROS, 8)
/* [V as 0..3][R - 1][dot][gaps] */
static const NAME(kernel) NAME(kernels)[4][12][3][2] = {
    {UPTO(R1)(ENTRY, 1)}, {UPTO(R2)(ENTRY, 2)}, {UPTO(R4)(ENTRY, 4)}, {UPTO(R8)(ENTRY, 8)}};
static const int NAME(most)[4] = {R1, R2, R4, R8};

/* Vectors of sums of V < 8 rows that one function takes: so many that their products need not wait for each other. Of eight rows two do. */
#if defined(WIDE) && defined(DPBUSD)
#define BYTE_VECTORS 4
#define UPTO_BYTES UPTO4
#else
#define BYTE_VECTORS 2
#define UPTO_BYTES UPTO2
#endif

typedef void (*NAME(byte_kernel))(const uint16_t *, size_t, size_t, const strip *);
/* One function per V and R. A panel of no more tokens, as Linears have, is a case of its own: its strides are constants. */
#define MICRO_BYTES(V, R)                                                                                               \
    static void NAME(micro_bytes_##V##_##R)(const uint16_t *panel, size_t stride, size_t apart, const strip *p) {       \
        const size_t whole = (R + 1) / 2 * 2 * VW;                                                                      \
        if (stride == whole && apart == 2 * VW)                                                                         \
            NAME(micro_bytes)(V, R, panel, whole, 2 * VW, *p);                                                          \
        else                                                                                                            \
            NAME(micro_bytes)(V, R, panel, stride, apart, *p);                                                          \
    }
#define BYTE_ENTRY(V, R) NAME(micro_bytes_##V##_##R),
UPTO_BYTES(MICRO_BYTES, 1)
UPTO_BYTES(MICRO_BYTES, 2)
UPTO_BYTES(MICRO_BYTES, 4)
UPTO2(MICRO_BYTES, 8)
/* [V as 0..3][R - 1] */
static const NAME(byte_kernel) NAME(byte_kernels)[4][BYTE_VECTORS] = {
    {UPTO_BYTES(BYTE_ENTRY, 1)}, {UPTO_BYTES(BYTE_ENTRY, 2)}, {UPTO_BYTES(BYTE_ENTRY, 4)}, {UPTO2(BYTE_ENTRY, 8)}};

/* Passes of a matrix's micro-kernel over `vectors` of tokens, and the vectors of one. */
static int NAME(pass)(const matrix *m) { return m->lanes != BYTES ? NAME(most)[v_log(m)] : m->v < 8 ? BYTE_VECTORS : 2; }
static int NAME(passes)(const matrix *m, int vectors) { return (vectors + NAME(pass)(m) - 1) / NAME(pass)(m); }

/* Rows of output for one tile: groups [g0, g1), channel blocks [b0, b1), each block at the taps of one of `columns` columns.
 * `panel` starts at block b0, and the rows of each of these taps at `tap_at`; a row of `out` is `out_stride` floats, and the row of
 * group g0 the first, unless the matrix has an order of its own. With CODES and BYTES these rows are whole numbers, see `sum_of`, and
 * start at block b0; else what `out` holds of the blocks before b0 is added to. Columns after the first always add. Of bytes a panel
 * is of lanes of 16 bits; where `vectors` are odd, only the first of the last two is of use. */
static void NAME(multiply)(const matrix *m, int g0, int g1, int b0, int b1, const float *panel, size_t stride,
                           const size_t *tap_at, int column, int columns, const int *gaps, float *out, size_t out_stride, int vectors) {
    int passes = NAME(passes)(m, vectors), unit = unit_of(m), units = (vectors + unit - 1) / unit;
    size_t groups = m->rows / m->v;
    for (int b = b0; b < b1; b++) {
        int channels = m->inner - b * m->block < m->block ? m->inner - b * m->block : m->block;
        size_t steps = steps_of(m, channels), before = (size_t)b * steps_of(m, m->block) * m->taps;
        size_t next = columns * steps * groups;
#ifdef DPBUSD
        const int taps = m->taps / columns, together = m->lanes == BYTES ? taps : 1;
#else /* where fewer products are made of a number that is loaded, one tap's rows of the panel must lie in the first-level cache */
        const int taps = m->taps / columns, together = 1;
#endif
        for (int tap = 0; tap < taps; tap += together) {
            size_t first = (before + column * steps) * groups + tap * next;
            const char *rows = (const char *)panel + (tap_at[tap] + (size_t)((b - b0) * m->block / m->group * m->planes) * stride) * lane_bytes(m);
            for (int g = g0; g < g1; g += RUN) {
                strip p = {.index = m->index + first + g * steps,
                          .weights = (const lane *)m->values + lanes_of(m, first + g * steps) * m->v,
                          .steps = (int)steps,
                          .taps = together,
                          .index_apart = next,
                          .weights_apart = lanes_of(m, next) * m->v,
                          .tap_at = tap_at + tap,
                          .groups = g1 - g < RUN ? g1 - g : RUN,
                          .order = m->order ? m->order + g * m->v : NULL,
                          .out_stride = out_stride,
                          .bias = m->bias && !whole_numbers(m) ? m->bias + g * m->v : NULL,
                          .begin = b == (whole_numbers(m) ? b0 : 0) && column + tap == 0};
                for (int pass = 0; pass < passes; pass++) {
                    int r0 = units * pass / passes * unit, r1 = units * (pass + 1) / passes * unit;
                    r1 = r1 < vectors ? r1 : vectors;
                    p.out = out + (m->order ? 0 : (size_t)(g - g0) * m->v * out_stride) + r0 * VW;
                    const char *at = rows + (gaps ? 0 : r0 * VW) * lane_bytes(m);
                    if (m->lanes == BYTES)
                        NAME(byte_kernels)[v_log(m)][r1 - r0 - 1]((const uint16_t *)at + (gaps ? gaps[r0] : 0), stride,
                                                                  gaps && r1 - r0 > 2 ? gaps[r0 + 2] - gaps[r0] : 2 * VW, &p);
                    else
                        NAME(kernels)[v_log(m)][r1 - r0 - 1][m->lanes][gaps != NULL]((const float *)at, stride, gaps ? gaps + r0 : NULL, &p);
                }
            }
        }
    }
}

/* --- Token-major in and out: tiles are transposed on the way into and out of a panel. --- */

/* The pairs of four channels, as rows of pairs: all six, or of a dense weight (`dense`) the two a = (x0, x1), b = (x2, x3) per lane. */
INLINE void NAME(pairs)(vu a, vu b, int dense, float *plane, size_t stride) {
    if (dense) {
        NAME(store)(plane, (vf)a);
        NAME(store)(plane + stride, (vf)b);
        return;
    }
    vu low_a = a & 0xffff, high_a = a >> 16, low_b = b << 16, high_b = b & 0xffff0000u;
    NAME(store)(plane, (vf)a);
    NAME(store)(plane + stride, (vf)(low_a | low_b));
    NAME(store)(plane + 2 * stride, (vf)(low_a | high_b));
    NAME(store)(plane + 3 * stride, (vf)(high_a | low_b));
    NAME(store)(plane + 4 * stride, (vf)(high_a | high_b));
    NAME(store)(plane + 5 * stride, (vf)b);
}

/* One vector of 32-bit entries of a row of `left` bytes that are left, zeros after its end. */
INLINE vu NAME(part)(const char *p, ptrdiff_t left) {
    vu whole, some = {0};
    if (left >= 4 * VW) {
        memcpy(&whole, p, 4 * VW); /* on its own, so that it stays in a register */
        return whole;
    }
    memcpy(&some, p, left > 0 ? left : 0);
    return some;
}

/* The same where it is written: nothing after the row's end. */
INLINE void NAME(keep)(float *p, vu x, int left) {
    if (left >= VW)
        NAME(store)(p, (vf)x);
    else
        memcpy(p, &x, left * 4);
}

/* VW entries of a row of fp32 or (`half`) bf16 of which `left` are left, as fp32, zeros after its end. */
INLINE vu NAME(entries)(const char *p, int half, int left) {
    if (!half)
        return NAME(part)(p, (ptrdiff_t)left * 4);
    if (left >= VW)
        return NAME(widen)((const uint16_t *)p) << 16;
    uint16_t whole[VW] = {0};
    memcpy(whole, p, left * 2);
    return NAME(widen)(whole) << 16;
}

/* Scales of `count` tokens, a multiple of VW, whose lowest numbers are in `scale`, the highest in `inverse`, and sums of x * 0, not a
 * number where some x is none or infinite, in `zero`. There are 254 steps from the lowest to the highest, so that rounding of both ends
 * leaves no code above 255. */
static void NAME(byte_scales)(meaning at, size_t count) {
    for (size_t t = 0; t < count; t += VW) {
        vf low = NAME(load)(at.scale + t), high = NAME(load)(at.inverse + t);
        vi finite = (low >= -FLT_MAX) & (high <= FLT_MAX) & (NAME(load)((float *)at.zero + t) == 0.0f);
        vf scale = NAME(max)(high / 254.0f - low / 254.0f, NAME(all)(1e-32f)), inverse = (vf)((vi)(1.0f / scale) & finite);
        NAME(store)(at.scale + t, (vf)(((vi)scale & finite) | ((vi)NAME(all)(NAN) & ~finite)));
        NAME(store)(at.inverse + t, inverse);
        *(vu *)(at.zero + t) = NAME(code)(-(vf)((vi)low & finite), inverse);
    }
}

/* Four channels of VW tokens as bytes, the first in the lowest bits. */
INLINE vu NAME(bytes_of)(const vf x[4], vf inverse, vu zero) {
    vu c[4];
    UNROLL for (int i = 0; i < 4; i++) {
        vf scaled = x[i] * inverse;
        ROUNDED(scaled);
        c[i] = (vu)(scaled + MAGIC) + zero; /* of which the last byte counts */
    }
    vu low = (c[0] & 0xff) | (c[1] << 8 & ~0xffu), high = (c[2] & 0xff) | (c[3] << 8 & ~0xffu);
    return (low & 0xffff) | high << 16;
}

/* The same from the bytes of two vectors of tokens. `lined`: in the order of tokens; else so that `both` gives vectors that are. */
INLINE void NAME(byte_pairs)(vu first, vu second, int lined, int dense, uint16_t *plane, size_t stride) {
    vs low, high;
    UNROLL for (int j = 0; j < 2 * VW; j++) {
        low[j] = 2 * (lined ? j : j / 8 * 4 + j % 4 + j % 8 / 4 * VW);
        high[j] = low[j] + 1;
    }
    vus a = (vus)__builtin_shuffle((vs)first, (vs)second, low), b = (vus)__builtin_shuffle((vs)first, (vs)second, high);
    *(vus *)plane = a;
    if (dense) {
        *(vus *)(plane + stride) = b;
        return;
    }
    *(vus *)(plane + stride) = (a & 0xff) | (b << 8);
    *(vus *)(plane + 2 * stride) = (a & 0xff) | (b & 0xff00);
    *(vus *)(plane + 3 * stride) = (a >> 8) | (b << 8);
    *(vus *)(plane + 4 * stride) = (a >> 8) | (b & 0xff00);
    *(vus *)(plane + 5 * stride) = b;
}

/* Scales, inverse scales and zeros of VW tokens of a tile from the `t`th on, for bytes; of what fills a vector codes are zero. */
static void NAME(scales_of_bytes)(const job *j, const matrix *m, int64_t t0, int t, int count, meaning at) {
    int bytes = j->half ? 2 : 4, whole = j->half ? 0 : m->inner / VW * VW;
    vu low[VW], high[VW], odd[VW]; /* odd: sums of x * 0 */
    for (int i = 0; i < VW; i++) {
        const char *p = (const char *)j->x + (t0 + t + i) * m->inner * bytes;
        vf least = {0}, most = {0}, nan = {0};
        if (t + i < count) {
            int k = 0;
            for (; k < whole; k += VW) { /* most of it, without a question asked */
                vf x = NAME(load)((const float *)p + k);
                __builtin_prefetch((const float *)p + k + m->inner);
                least = NAME(min)(least, x), most = NAME(max)(most, x), nan += x * 0.0f;
            }
            for (; k < m->inner; k += VW) {
                vf x = (vf)NAME(entries)(p + k * bytes, j->half, m->inner - k);
                least = NAME(min)(least, x), most = NAME(max)(most, x), nan += x * 0.0f;
            }
        }
        low[i] = (vu)least, high[i] = (vu)most, odd[i] = (vu)nan;
    }
    meaning own = {.scale = at.scale + t, .inverse = at.inverse + t, .zero = at.zero + t};
    NAME(store)(own.scale, NAME(of_lanes)(LOWEST, low));
    NAME(store)(own.inverse, NAME(of_lanes)(HIGHEST, high));
    NAME(store)((float *)own.zero, NAME(of_lanes)(SUM, odd));
    NAME(byte_scales)(own, VW);
}

/* The scale and the inverse scale of each token of a tile, for codes of 16 bits. */
static void NAME(scales_of_codes)(const job *j, const matrix *m, int64_t t0, int count, meaning at, size_t stride) {
    int bytes = j->half ? 2 : 4;
    for (size_t t = 0; t < stride; t += VW) {
        vu high[VW];
        for (int i = 0; i < VW; i++) {
            const char *p = (const char *)j->x + (t0 + (int64_t)t + i) * m->inner * bytes;
            vf most = {0};
            for (int k = 0; k < m->inner && (int)t + i < count; k += VW)
                most = NAME(larger)(most, (vf)NAME(entries)(p + k * bytes, j->half, m->inner - k));
            high[i] = (vu)most;
        }
        NAME(store)(at.scale + t, NAME(of_lanes)(MAGNITUDE, high));
    }
    scales_of(at.scale, at.inverse, count, m->largest);
    memset(at.scale + count, 0, (stride - count) * sizeof *at.scale);
    memset(at.inverse + count, 0, (stride - count) * sizeof *at.inverse);
}

/* Four channels of VW tokens as codes, in their rows of pairs. */
INLINE void NAME(code_pairs)(const vf x[4], vf inverse, int dense, float *plane, size_t stride) {
    vu c[4];
    UNROLL for (int i = 0; i < 4; i++) c[i] = NAME(code)(x[i], inverse);
    NAME(pairs)(c[0] | (c[1] << 16), c[2] | (c[3] << 16), dense, plane, stride);
}

/* What VW sums of row n of a product of whole numbers stand for, for tokens with these scales and zeros (`meaning`):
 * (sum * scale of the row) * scale of the token, + bias. */
INLINE vf NAME(sum_of)(int lanes, const products *m, int n, vi sums, vf scale, vi zero, int biased) {
    if (lanes == BYTES)
        sums -= (zero - CENTRE) * (m->after[n] - m->before[n]);
    vf x = __builtin_convertvector(sums, vf) * NAME(all)(m->scale[n]) * scale;
    ROUNDED(x);
    if (biased)
        x = x + NAME(all)(m->bias[n]);
    return x;
}

/* Channels [k, k + 4 VW) of a token as bytes, four to a lane, zeros after the row's end; FOUR(i) says which four of them are in lane i. */
#define FOUR(lane) ((lane) % 4 * (VW / 4) + (lane) / 4)
INLINE vu NAME(token_bytes)(const job *j, const matrix *m, int64_t token, int k, vf inverse, vu zero) {
    const char *x = (const char *)j->x + (token * m->inner + k) * (j->half ? 2 : 4);
    vu c[4];
    UNROLL for (int i = 0; i < 4; i++) {
        int left = m->inner - k - i * VW;
        vf scaled = {0};
        if (!j->half && left >= VW)
            scaled = NAME(load)((const float *)x + i * VW);
        else if (left > 0)
            scaled = (vf)NAME(entries)(x + i * VW * (j->half ? 2 : 4), j->half, left);
        scaled *= inverse;
        ROUNDED(scaled);
        c[i] = ((vu)(scaled + MAGIC) + zero) & 0xff; /* of which the last byte counts */
    }
    return PACKED(c);
}

/* The same as gather_tokens, with the scales of the tokens. A vector of them at a time, so that what its scales were found from is still
 * near; the first of two waits in the panel for the other. */
static void NAME(gather_bytes)(const job *j, const matrix *m, int64_t t0, int count, uint16_t *panel, size_t stride, meaning at) {
    const int rows = rows_of_four(m), dense = is_dense(m);
    for (int t = 0; t < (int)stride; t += VW) {
        NAME(scales_of_bytes)(j, m, t0, t, count, at);
        for (int k = 0; k < m->inner; k += 4 * VW) {
            vu r[VW];
            for (int i = 0; i < VW; i++)
                r[i] = t + i < count ? NAME(token_bytes)(j, m, t0 + t + i, k, NAME(all)(at.inverse[t + i]), (vu)(vi){0} + at.zero[t + i]) : (vu){0};
            NAME(transpose)(r);
            UNROLL for (int i = 0; i < VW; i++) {
                int group = k / 4 + FOUR(i);
                uint16_t *plane = panel + (size_t)(group * rows) * stride + t / (2 * VW) * (2 * VW);
                if (group >= m->inner / 4)
                    continue;
                if (t / VW % 2 == 0)
                    *(vu *)plane = r[i];
                else
                    NAME(byte_pairs)(*(const vu *)plane, r[i], 0, dense, plane, stride);
            }
        }
    }
}

/* Tokens [t0, t0 + count) of x (tokens, inner) into the panel, zeros for the tokens that fill the last vector. */
static void NAME(gather_tokens)(const job *j, const matrix *m, int64_t t0, int count, float *panel, size_t stride, meaning at) {
    int bytes = j->half ? 2 : 4, lanes = m->lanes == HALVES ? 2 * VW : VW; /* channels per transposed block */
    const int rows = rows_of_four(m), dense = is_dense(m);
    const char *x = j->x;
    if (m->lanes == BYTES) {
        NAME(gather_bytes)(j, m, t0, count, (uint16_t *)panel, stride, at);
        return;
    }
    for (int t = 0; t < count; t += VW) {
        for (int k = 0; k < m->inner; k += lanes) {
            vu r[VW];
            UNROLL for (int i = 0; i < VW; i++) {
                if (t + i >= count) {
                    r[i] = (vu){0};
                    continue;
                }
                const char *p = x + ((t0 + t + i) * m->inner + k) * bytes;
                r[i] = m->lanes == HALVES ? NAME(part)(p, (ptrdiff_t)(m->inner - k) * bytes)
                                        : NAME(entries)(p, j->half, m->inner - k);
            }
            NAME(transpose)(r);
            if (m->lanes == CODES) {
                for (int i = 0; i < VW && k + i < m->inner; i += 4)
                    NAME(code_pairs)((const vf *)(r + i), NAME(load)(at.inverse + t), dense,
                                     panel + (size_t)((k + i) / 4 * rows) * stride + t, stride);
            } else if (m->lanes == HALVES) {
                for (int i = 0; i < VW && k + 2 * i < m->inner; i += 2)
                    NAME(pairs)(r[i], r[i + 1], dense, panel + (size_t)((k + 2 * i) / 4 * rows) * stride + t, stride);
            } else {
                for (int i = 0; i < VW && k + i < m->inner; i++) NAME(store)(panel + (k + i) * stride + t, (vf)r[i]);
            }
        }
    }
}

/* Row n of the output, VW tokens of it: as it is in `out`, or what the sums there stand for. */
INLINE vu NAME(output)(int lanes, int biased, const products *m, const float *out, int n, vf scale, vi zero) {
    return (vu)(lanes < CODES ? NAME(load)(out) : NAME(sum_of)(lanes, m, n, *(const vi *)out, scale, zero, biased));
}

/* Rows [n0, n0 + rows) of the output, feature-major in `out`, into y (tokens, columns). With CODES and BYTES they are sums. */
INLINE void NAME(scatter)(int lanes, int biased, const job *j, products m, meaning units, const float *out, size_t stride, int n0,
                          int rows, int columns, int64_t t0, int count) {
    const int half = j->half, step = half ? 2 * VW : VW, bytes = half ? 2 : 4;
    char *y = j->y;
    for (int t = 0; t < count; t += VW) { /* few tokens at a time: their rows of y often fall into the same sets of the cache */
        vf scale = {0};
        vi zero = {0};
        if (lanes >= CODES)
            scale = NAME(load)(units.scale + t);
        if (lanes == BYTES)
            zero = *(const vi *)(units.zero + t);
        int n = 0;
        for (; n + VW <= rows && t + VW <= count && !half; n += VW) { /* most of it, without a question asked */
            vu r[VW];
            UNROLL for (int i = 0; i < VW; i++)
                r[i] = NAME(output)(lanes, biased, &m, out + (n + i) * stride + t, n0 + n + i, scale, zero);
            NAME(transpose)(r);
            UNROLL for (int i = 0; i < VW; i++) {
                float *to = (float *)y + (t0 + t + i) * columns + n0 + n;
                __builtin_prefetch(to + 2 * VW, 1);
                NAME(store)(to, (vf)r[i]);
            }
        }
        for (; n < rows; n += step) {
            int width = (rows - n < step ? rows - n : step) * bytes;
            vu r[VW];
            UNROLL for (int i = 0; i < VW; i++) {
                int first = half ? n + 2 * i : n + i, next = first + 1;
                const float *at = out + first * stride + t;
                r[i] = first < rows ? NAME(output)(lanes, biased, &m, at, n0 + first, scale, zero) : (vu){0};
                if (half) {
                    vu high = next < rows ? NAME(output)(lanes, biased, &m, at + stride, n0 + next, scale, zero) : (vu){0};
                    r[i] = NAME(round16)((vf)r[i]) | (NAME(round16)((vf)high) << 16);
                }
            }
            NAME(transpose)(r);
            int valid = count - t < VW ? count - t : VW;
            UNROLL for (int i = 0; i < VW; i++) {
                if (i >= valid)
                    break;
                char *to = y + ((t0 + t + i) * columns + n0 + n) * bytes;
                if (width == 4 * VW)
                    memcpy(to, &r[i], 4 * VW); /* one store, also where rows of bf16 start at odd places */
                else
                    memcpy(to, &r[i], width);
            }
        }
    }
}

static ALONE void NAME(scatter_tokens)(const job *j, const float *out, size_t stride, int n0, int rows, int columns, int64_t t0,
                                 int count) {
    NAME(scatter)(FLOATS, 0, j, (products){0}, (meaning){0}, out, stride, n0, rows, columns, t0, count);
}

static ALONE void NAME(scatter_sums)(const job *j, const matrix *m, meaning units, const float *sums, size_t stride, int n0, int rows,
                               int64_t t0, int count) {
    products p = products_of(m, units);
    if (m->lanes == BYTES && m->bias)
        NAME(scatter)(BYTES, 1, j, p, units, sums, stride, n0, rows, m->rows, t0, count);
    else if (m->lanes == BYTES)
        NAME(scatter)(BYTES, 0, j, p, units, sums, stride, n0, rows, m->rows, t0, count);
    else if (m->bias)
        NAME(scatter)(CODES, 1, j, p, units, sums, stride, n0, rows, m->rows, t0, count);
    else
        NAME(scatter)(CODES, 0, j, p, units, sums, stride, n0, rows, m->rows, t0, count);
}

/* The units of a job's tokens: so many vectors as its matrices take at least. */
static int64_t NAME(units_of)(const job *j) { return (j->tokens + unit_of(&j->first) * VW - 1) / (unit_of(&j->first) * VW); }

/* Vectors of a tile of so many tokens or pixels: whole units. */
static int NAME(vectors_of)(const job *j, int64_t tokens) {
    int unit = unit_of(&j->first);
    return (int)((tokens + unit * VW - 1) / (unit * VW)) * unit;
}

/* Those of them that are multiplied: not the last of bytes, if it holds no token. */
static int NAME(used)(const matrix *m, int count, int vectors) { return vectors - (m->lanes == BYTES && count <= (vectors - 1) * VW); }

/* A tile of tokens through one matrix. */
static void NAME(linear_tile)(const job *j, int64_t t0, int count, float *scratch) {
    const matrix *m = &j->first;
    int vectors = NAME(vectors_of)(j, count), used = NAME(used)(&j->first, count, vectors);
    size_t stride = (size_t)vectors * VW;
    float *panel = scratch, *out = panel + panel_rows(m) * stride * lane_bytes(m) / 4;
    int blocks = (m->inner + m->block - 1) / m->block;
    int chunk = m->order ? m->rows : CHUNK < m->rows ? CHUNK : m->rows;
    float *scale = out + (size_t)chunk * stride;
    meaning units = {.scale = scale, .inverse = scale + stride, .zero = (int32_t *)(scale + 2 * stride), .b1 = blocks};
    if (m->lanes == CODES)
        NAME(scales_of_codes)(j, m, t0, count, units, stride);
    NAME(gather_tokens)(j, m, t0, count, panel, stride, units);
    for (int n = 0; n < m->rows; n += chunk) {
        int rows = m->rows - n < chunk ? m->rows - n : chunk;
        NAME(multiply)(m, n / m->v, (n + rows) / m->v, 0, blocks, panel, stride, HERE, 0, 1, NULL, out, stride, used);
        if (whole_numbers(m))
            NAME(scatter_sums)(j, m, units, out, stride, n, rows, t0, count);
        else
            NAME(scatter_tokens)(j, out, stride, n, rows, m->rows, t0, count);
    }
}

/* GELU of `rows` hidden channels, which are sums of whole numbers of `a`, in place; then as such, in the rows of pairs of `pairs`.
 * Tokens have a scale for these channels alone, so that no other has to exist. */
static void NAME(hidden_bytes)(const job *j, int n, int rows, const meaning *units, float *hidden, uint16_t *pairs, meaning own,
                               size_t stride) {
    products p = products_of(&j->first, *units);
    const int tanh_form = j->tanh_form, biased = p.bias != NULL, of_four = rows_of_four(&j->second), dense = is_dense(&j->second);
    for (size_t t = 0; t < stride; t += 2 * VW) {
        vf low[2] = {{0}}, high[2] = {{0}}, odd[2] = {{0}};
        for (int i = 0; i < rows; i++) {
            UNROLL for (int half = 0; half < 2; half++) {
                size_t from = t + half * VW;
                float *at = hidden + i * stride + from;
                vf h = NAME(sum_of)(BYTES, &p, n + i, *(const vi *)at, NAME(load)(units->scale + from), *(const vi *)(units->zero + from), biased);
                h = NAME(rough_gelu)(h, tanh_form);
                NAME(store)(at, h);
                low[half] = NAME(min)(low[half], h), high[half] = NAME(max)(high[half], h), odd[half] += h * 0.0f;
            }
        }
        UNROLL for (int half = 0; half < 2; half++) {
            NAME(store)(own.scale + t + half * VW, low[half]);
            NAME(store)(own.inverse + t + half * VW, high[half]);
            NAME(store)((float *)own.zero + t + half * VW, odd[half]);
        }
    }
    NAME(byte_scales)(own, stride);
    for (int i = 0; i < rows; i += 4) {
        for (size_t t = 0; t < stride; t += 2 * VW) {
            vu four[2];
            UNROLL for (int half = 0; half < 2; half++) {
                size_t from = t + half * VW;
                vf h[4];
                UNROLL for (int k = 0; k < 4; k++) h[k] = NAME(load)(hidden + (i + k) * stride + from);
                four[half] = NAME(bytes_of)(h, NAME(load)(own.inverse + from), *(const vu *)(own.zero + from));
            }
            NAME(byte_pairs)(four[0], four[1], 0, dense, pairs + (size_t)(i / 4 * of_four) * stride + t, stride);
        }
    }
}

/* The same in codes. */
static void NAME(hidden_codes)(const job *j, int n, int rows, const meaning *units, float *hidden, float *pairs, meaning own,
                               size_t stride) {
    float *hidden_scale = own.scale, *inverse = own.inverse;
    products p = products_of(&j->first, *units);
    const int tanh_form = j->tanh_form, biased = p.bias != NULL, of_four = rows_of_four(&j->second), dense = is_dense(&j->second);
    for (size_t t = 0; t < stride; t += VW) {
        vf scale = NAME(load)(units->scale + t), most = {0};
        for (int i = 0; i < rows; i++) {
            float *at = hidden + i * stride + t;
            vf h = NAME(rough_gelu)(NAME(sum_of)(CODES, &p, n + i, *(const vi *)at, scale, (vi){0}, biased), tanh_form);
            NAME(store)(at, h);
            most = NAME(larger)(most, h);
        }
        NAME(store)(hidden_scale + t, most);
    }
    scales_of(hidden_scale, inverse, (int)stride, j->second.largest);
    for (int i = 0; i < rows; i += 4) {
        for (size_t t = 0; t < stride; t += VW) {
            vf h[4];
            UNROLL for (int k = 0; k < 4; k++) h[k] = NAME(load)(hidden + (i + k) * stride + t);
            NAME(code_pairs)(h, NAME(load)(inverse + t), dense, pairs + (size_t)(i / 4 * of_four) * stride + t, stride);
        }
    }
}

/* out (+)= what the sums of a chunk of hidden channels stand for. */
INLINE void NAME(add)(int lanes, int begin, int biased, const matrix *m, const float *sums, meaning units, float *out, size_t stride) {
    products p = products_of(m, units);
    for (int n = 0; n < m->rows; n++) {
        for (size_t t = 0; t < stride; t += VW) {
            size_t at = n * stride + t;
            vi zero = lanes == BYTES ? *(const vi *)(units.zero + t) : (vi){0};
            vf x = NAME(sum_of)(lanes, &p, n, *(const vi *)(sums + at), NAME(load)(units.scale + t), zero, biased);
            if (!begin)
                x = NAME(load)(out + at) + x;
            NAME(store)(out + at, x);
        }
    }
}
static void NAME(add_sums)(const matrix *m, const float *sums, meaning units, float *out, size_t stride, int begin) {
    if (m->lanes == BYTES)
        NAME(add)(BYTES, begin, begin && m->bias != NULL, m, sums, units, out, stride);
    else
        NAME(add)(CODES, begin, begin && m->bias != NULL, m, sums, units, out, stride);
}

/* A tile of tokens through matrix, GELU, matrix: of the hidden channels only a chunk exists at a time. */
static void NAME(pair_tile)(const job *j, int64_t t0, int count, float *scratch) {
    const matrix *a = &j->first, *b = &j->second;
    int vectors = NAME(vectors_of)(j, count), used = NAME(used)(&j->first, count, vectors);
    size_t stride = (size_t)vectors * VW;
    float *panel = scratch;
    float *hidden = panel + panel_rows(a) * stride * lane_bytes(a) / 4;
    int chunk = hidden_chunk(b);
    float *pairs = hidden + (size_t)chunk * stride;
    float *out = pairs + (b->lanes ? (size_t)(chunk / 4 * rows_of_four(b)) * stride * lane_bytes(b) / 4 : 0);
    float *sums = out + (size_t)b->rows * stride; /* from here on for whole numbers alone */
    float *scale = sums + (size_t)b->rows * stride;
    int blocks = (a->inner + a->block - 1) / a->block, codes = whole_numbers(b);
    meaning units = {.scale = scale, .inverse = scale + stride, .zero = (int32_t *)(scale + 2 * stride), .b1 = blocks};
    meaning own = {.scale = scale + 3 * stride, .inverse = scale + 4 * stride, .zero = (int32_t *)(scale + 5 * stride)};
    if (a->lanes == CODES)
        NAME(scales_of_codes)(j, a, t0, count, units, stride);
    NAME(gather_tokens)(j, a, t0, count, panel, stride, units);
    for (int n = 0; n < a->rows; n += chunk) {
        int rows = a->rows - n < chunk ? a->rows - n : chunk;
        NAME(multiply)(a, n / a->v, (n + rows) / a->v, 0, blocks, panel, stride, HERE, 0, 1, NULL, hidden, stride, used);
        if (b->lanes == BYTES)
            NAME(hidden_bytes)(j, n, rows, &units, hidden, (uint16_t *)pairs, own, stride);
        else if (codes)
            NAME(hidden_codes)(j, n, rows, &units, hidden, pairs, own, stride);
        else if (b->lanes) {
            for (int k = 0; k < rows; k += 4) {
                for (int t = 0; t < (int)stride; t += VW) {
                    vu h[4];
                    UNROLL for (int i = 0; i < 4; i++)
                        h[i] = NAME(round16)(NAME(gelu)(NAME(load)(hidden + (k + i) * stride + t), j->tanh_form));
                    NAME(pairs)(h[0] | (h[1] << 16), h[2] | (h[3] << 16), is_dense(b),
                                pairs + (size_t)(k / 4 * rows_of_four(b)) * stride + t, stride);
                }
            }
        } else {
            for (size_t i = 0; i < rows * stride; i += VW)
                NAME(store)(hidden + i, NAME(gelu)(NAME(load)(hidden + i), j->tanh_form));
        }
        own.b0 = n / b->block, own.b1 = (n + rows + b->block - 1) / b->block;
        NAME(multiply)(b, 0, b->rows / b->v, own.b0, own.b1, b->lanes ? pairs : hidden, stride, HERE, 0, 1, NULL, codes ? sums : out,
                       stride, used);
        if (codes)
            NAME(add_sums)(b, sums, own, out, stride, n == 0);
    }
    NAME(scatter_tokens)(j, out, stride, 0, b->rows, b->rows, t0, count);
}

/* --- Convolutions: images (batch, channels, height, width), square kernels, padding with zeros. --- */

/* Lines of phase `phase`: those that its taps, every `step`th one, see of so many rows of output. */
static int NAME(phase_lines)(const job *j, int rows, int phase) { return rows + (j->side - 1 - phase) / j->step; }

/* Lines of a panel, of an image's pixels, for so many rows of output: `step` of them apart in the image, so those that a tap of the kernel
 * sees follow each other; then the same of the lines between them. */
static int NAME(lines_of)(const job *j, int rows) {
    int lines = 0;
    for (int phase = 0; phase < j->step; phase++) lines += NAME(phase_lines)(j, rows, phase);
    return lines;
}

/* Lines of an image that they are of. */
static int NAME(image_lines)(const job *j, int rows) { return (rows - 1) * j->step + j->side; }

/* Rows of whole numbers per group of four channels, and where their first pixel lies: what is before it is read and not used. */
#define NUMBER_ROWS(m) ((m)->lanes == BYTES ? 1 : 2)
#define BEFORE VW
_Static_assert(BEFORE >= 3, "the furthest that a kernel of seven which keeps the size reads to the left");

/* Whether the result has the image's size, each pixel of it where the middle of the kernel is. */
static int NAME(keeps_size)(const job *j) { return j->step == 1 && 2 * j->padding == j->side - 1; }

/* Pixels of an image in a panel and in the image, and how far apart their rows lie for so many images. */
typedef struct {
    size_t each, stride, numbers_each, number_stride;
} NAME(room);
static NAME(room) NAME(room_of)(const job *j, int rows, int images) {
    size_t past = unit_of(&j->first) * VW; /* a last vector may read past the last pixel */
    NAME(room) r = {.each = (size_t)NAME(lines_of)(j, rows) * j->out_width, .numbers_each = (size_t)NAME(image_lines)(j, rows) * j->width};
    r.stride = images * r.each + past, r.number_stride = images * r.numbers_each + past + 2 * BEFORE;
    return r;
}

/* Where each pixel of a panel for `rows` rows of output from `row` on lies, less the first pixel of line `first` of the image, as the
 * taps of a column of the kernel see it; -1 where the image has ended, and for `more` pixels after the last. */
static void NAME(places_of)(const job *j, int row, int rows, int column, int first, int32_t *at, int more) {
    for (int phase = 0; phase < j->step; phase++) {
        for (int i = 0; i < NAME(phase_lines)(j, rows, phase); i++) {
            int y = j->step * (row + i) + phase - j->padding;
            for (int to = 0, x = column - j->padding; to < j->out_width; to++, x += j->step)
                *at++ = y >= 0 && y < j->height && x >= 0 && x < j->width ? (y - first) * j->width + x : -1;
        }
    }
    for (int i = 0; i < more; i++) *at++ = -1;
}

/* The pixels of one channel of one image that lie `shift` to the right of those that a tile needs: rows [row - reach, row + rows + reach),
 * zeros where the image ends. For a result of the image's size. */
static void NAME(gather_row)(const job *j, const matrix *m, int64_t image, int c, int row, int rows, int shift, float *to_row) {
    int reach = j->side / 2, w = j->width, h = j->height, bytes = j->half ? 2 : 4;
    int from = row - reach < 0 ? 0 : row - reach, to = row + rows + reach > h ? h : row + rows + reach;
    size_t skipped = (size_t)(from - (row - reach)) * w, count = (size_t)(to - from) * w, whole = (size_t)(rows + 2 * reach) * w;
    const char *x = (const char *)j->x + ((image * m->inner + c) * (size_t)h * w + (size_t)from * w) * bytes;
    memset(to_row, 0, skipped * 4);
    size_t lost = shift < 0 ? -shift : 0, past = shift > 0 ? shift : 0;
    if (lost + past >= count)
        memset(to_row + skipped, 0, count * 4);
    else if (j->half) {
        const uint16_t *source = (const uint16_t *)x + past;
        lane *bits = (lane *)(to_row + skipped + lost);
        for (size_t p = 0; p < count - lost - past; p++) bits[p] = (uint32_t)source[p] << 16;
    } else
        memcpy(to_row + skipped + lost, x + past * 4, (count - lost - past) * 4);
    memset(to_row + skipped + count, 0, (whole - skipped - count) * 4);
    for (size_t p = skipped; p < skipped + count && shift; p += w) {
        for (int edge = 0; edge < (int)lost && edge < w; edge++) to_row[p + edge] = 0;
        for (int edge = 0; edge < (int)past && edge < w; edge++) to_row[p + w - 1 - edge] = 0;
    }
}

/* Pixels of one channel of one image from their places. */
static void NAME(gather_places)(const job *j, const matrix *m, int64_t image, int c, const int32_t *at, float *to_row, size_t each) {
    size_t channel = (image * m->inner + c) * (size_t)j->height * j->width;
    const uint16_t *halves = (const uint16_t *)j->x + channel;
    const float *floats = (const float *)j->x + channel;
    for (size_t p = 0; p < each; p++) {
        if (j->half)
            ((lane *)to_row)[p] = at[p] < 0 ? 0 : (uint32_t)halves[at[p]] << 16;
        else
            to_row[p] = at[p] < 0 ? 0.0f : floats[at[p]];
    }
}

/* Pixels [q, q + VW) of a channel of `area` pixels, zeros before and after it. */
INLINE vu NAME(pixels)(const char *channel, int half, int64_t q, int64_t area) {
    if (q >= 0 && q + VW <= area)
        return NAME(entries)(channel + q * (half ? 2 : 4), half, VW);
    vu found = {0};
    for (int i = 0; i < VW; i++)
        if (q + i >= 0 && q + i < area)
            found[i] = half ? (uint32_t)((const uint16_t *)channel)[q + i] << 16 : ((const lane *)channel)[q + i];
    return found;
}

/* The meaning of an image's whole numbers, in `space` for three vectors. */
INLINE meaning NAME(of_image)(const job *j, const matrix *m, int64_t image, vf space[3]) {
    meaning units = {.scale = (float *)&space[0], .inverse = (float *)&space[1], .zero = (int32_t *)&space[2],
                     .b1 = (m->inner + m->block - 1) / m->block};
    if (m->lanes == BYTES) {
        space[0] = NAME(min)((vf){0}, NAME(all)(j->largest[image]));
        space[1] = NAME(max)((vf){0}, NAME(all)(j->largest[j->tokens + image]));
        space[2] = (vf){0};
        NAME(byte_scales)(units, VW);
    } else {
        float scale = j->largest[image], inverse;
        scales_of(&scale, &inverse, 1, m->largest);
        space[0] = NAME(all)(scale), space[1] = NAME(all)(inverse);
    }
    return units;
}

/* `each` pixels of an image from line `line` on, of four channels at a time, as the whole numbers that they are, zeros where the image
 * ends: one row of bytes, or two of codes, per group, `stride` apart. All columns of the kernel read them. */
static void NAME(gather_numbers)(const job *j, const matrix *m, int64_t image, int line, lane *numbers, size_t stride, size_t each) {
    int bytes = j->half ? 2 : 4;
    int64_t area = (int64_t)j->height * j->width, first = (int64_t)line * j->width;
    vf space[3] = {{0}};
    NAME(of_image)(j, m, image, space);
    for (int g = 0; g < m->inner / 4; g++) {
        const char *x = (const char *)j->x + (image * m->inner + 4 * g) * area * bytes;
        float *to = (float *)numbers + (size_t)g * NUMBER_ROWS(m) * stride;
        for (size_t p = 0; p < each; p += VW) { /* what is past the end is the next image's, or of no use */
            vf four[4];
            int64_t q = first + (int64_t)p;
            if (!j->half && q >= 0 && q + VW <= area) {
                UNROLL for (int c = 0; c < 4; c++) {
                    four[c] = NAME(load)((const float *)x + c * area + q);
                    __builtin_prefetch((const float *)x + (c + 4) * area + q); /* of the next four channels, which lie far away */
                }
            } else {
                UNROLL for (int c = 0; c < 4; c++) four[c] = (vf)NAME(pixels)(x + c * area * bytes, j->half, q, area);
            }
            if (m->lanes == BYTES)
                NAME(store)(to + p, (vf)NAME(bytes_of)(four, space[1], (vu)space[2]));
            else
                UNROLL for (int c = 0; c < 4; c += 2)
                    NAME(store)(to + c / 2 * stride + p, (vf)(NAME(code)(four[c], space[1]) | (NAME(code)(four[c + 1], space[1]) << 16)));
        }
    }
}

/* VW whole numbers of `row`, `none` where the image ends: those at p, of which `at` has bits where they are of use, or from their
 * places in `at`. */
INLINE vu NAME(numbers_at)(const lane *row, const int32_t *at, size_t p, int placed, vu none) {
    if (!placed) {
        vu here = *(const vu *)(at + p);
        return (*(const vu *)(row + p) & here) | (none & ~here);
    }
    vu found = none;
    for (int i = 0; i < VW; i++)
        if (at[p + i] >= 0)
            found[i] = row[at[p + i]];
    return found;
}

/* The rows of pairs of each four channels of whole numbers; `at` as above. */
INLINE void NAME(pairs_of)(int placed, const job *j, const matrix *m, int64_t image, const int32_t *at, const lane *numbers,
                           size_t number_stride, char *panel, size_t stride, size_t each) {
    vf space[3] = {{0}};
    NAME(of_image)(j, m, image, space);
    vu none = (vu)space[2] * 0x01010101; /* of codes no bits */
    const int rows = rows_of_four(m), dense = is_dense(m);
    for (int g = 0; g < m->inner / 4; g++) {
        const lane *row = numbers + (size_t)g * NUMBER_ROWS(m) * number_stride;
        for (size_t p = 0; p < each; p += unit_of(m) * VW) {
            char *to = panel + ((size_t)g * rows * stride + p) * lane_bytes(m);
            vu first = NAME(numbers_at)(row, at, p, placed, none);
            if (m->lanes == BYTES)
                NAME(byte_pairs)(first, NAME(numbers_at)(row, at, p + VW, placed, none), 1, dense, (uint16_t *)to, stride);
            else
                NAME(pairs)(first, NAME(numbers_at)(row + number_stride, at, p, placed, none), dense, (float *)to, stride);
        }
    }
}
static void NAME(pair_numbers)(const job *j, const matrix *m, int64_t image, int shift, const int32_t *at, const lane *numbers,
                               size_t number_stride, char *panel, size_t stride, size_t each) {
    if (NAME(keeps_size)(j))
        NAME(pairs_of)(0, j, m, image, at, numbers + shift, number_stride, panel, stride, each);
    else
        NAME(pairs_of)(1, j, m, image, at, numbers, number_stride, panel, stride, each);
}

/* What `count` sums of row n stand for, whole vectors of them; `to` may be where they lie. The next row is `next` after it. */
INLINE void NAME(numbers_of)(int lanes, const products *m, int n, const float *sums, vf scale, vi zero, float *to, int count,
                             int64_t next) {
    const int biased = m->bias != NULL, unit = lanes == BYTES ? 2 : 1;
    for (int p = 0; p < count; p += unit * VW) {
        vi found[2] = {*(const vi *)(sums + p)};
        if (lanes == BYTES)
            NAME(in_order)(sums + p, found);
        UNROLL for (int i = 0; i < unit; i++) {
            vf y = NAME(sum_of)(lanes, m, n, found[i], scale, zero, biased);
            int left = count - p - i * VW;
            __builtin_prefetch(to + p + i * VW + next, 1);
            if (left >= VW)
                NAME(store)(to + p + i * VW, y);
            else if (left > 0)
                NAME(keep)(to + p + i * VW, (vu)y, left);
        }
    }
}

/* Whether `images` whole images of a tile lie side by side, line by line, where each by itself would leave part of a unit unused. */
static int NAME(side_by_side)(const job *j, int images) {
    const matrix *m = &j->first;
    return m->lanes == BYTES && images > 1 && NAME(keeps_size)(j) && j->height * j->width % (unit_of(m) * VW) != 0;
}

/* The numbers that a column of the kernel sees in lines of images side by side, `each` of one image: their places among those of all
 * images, an image's first where a line has ended: that is a number before the image, and so nothing. */
static void NAME(places_side_by_side)(const job *j, int images, int lines, int shift, int32_t *at, size_t each, int more) {
    for (int line = 0; line < lines; line++)
        for (int i = 0; i < images; i++)
            for (int to = 0, x = shift; to < j->width; to++, x++)
                *at++ = (int32_t)(i * each) + (x >= 0 && x < j->width ? line * j->width + x : 0);
    for (int i = 0; i < more; i++) *at++ = 0;
}

/* What the sums of images side by side stand for. */
static void NAME(spread)(const job *j, const matrix *m, int64_t image, int images, const float *out, size_t out_stride) {
    const int w = j->width, area = j->height * w;
    float scale[PLACES * VW], y[PLACES * VW];
    int32_t zero[PLACES * VW];
    products known = {0};
    for (int i = 0; i < images; i++) {
        vf space[3] = {{0}};
        known = products_of(m, NAME(of_image)(j, m, image + i, space));
        for (int line = 0; line < j->height; line++)
            for (int x = 0, to = (line * images + i) * w; x < w; x++, to++) scale[to] = space[0][0], zero[to] = ((vi)space[2])[0];
    }
    for (size_t p = (size_t)images * area; p < out_stride; p++) scale[p] = 0.0f, zero[p] = 0;
    for (int o = 0; o < m->rows; o++) {
        for (size_t p = 0; p < out_stride; p += 2 * VW) {
            vi found[2];
            NAME(in_order)(out + o * out_stride + p, found);
            UNROLL for (int i = 0; i < 2; i++) {
                size_t of = p + i * VW;
                NAME(store)(y + of, NAME(sum_of)(BYTES, &known, o, found[i], NAME(load)(scale + of), *(const vi *)(zero + of), m->bias != NULL));
            }
        }
        for (int i = 0; i < images; i++) {
            size_t place = ((image + i) * m->rows + o) * (size_t)area;
            for (int line = 0; line < j->height; line++, place += w) {
                const float *from = y + (line * images + i) * w;
                if (!j->half)
                    memcpy((float *)j->y + place, from, w * 4);
                for (int x = 0; x < w && j->half; x++) ((uint16_t *)j->y)[place + x] = (uint16_t)NAME(round16)(NAME(all)(from[x]))[0];
            }
        }
    }
}

/* Pixels [p0, p0 + count) of image `image`, or, where count is the whole of one, `images` images from there on. */
static void NAME(conv_tile)(const job *j, int64_t image, int images, int p0, int count, float *scratch) {
    const matrix *m = &j->first;
    int w = j->out_width, area = j->out_height * w, plain = NAME(keeps_size)(j), whole = whole_numbers(m), unit = unit_of(m);
    int row = p0 / w, rows = (p0 + count - 1) / w - row + 1, first = row * j->step - j->padding;
    const NAME(room) room = NAME(room_of)(j, rows, images);
    const size_t each = room.each, stride = room.stride;
    const int beside = NAME(side_by_side)(j, images), line = beside ? images * w : w;
    int per_image = NAME(vectors_of)(j, count), vectors = beside ? NAME(vectors_of)(j, images * area) : images * per_image;
    float *panel = scratch, *out = panel + panel_rows(m) * stride * lane_bytes(m) / 4;
    size_t out_stride = (size_t)vectors * VW;
    int32_t *at = (int32_t *)(out + m->rows * out_stride);
    lane *numbers = (lane *)(at + images * each + 2 * unit * VW) + BEFORE; /* of whole numbers alone */
    size_t tap_at[7] = {0};
    int places[PLACES], blocks = (m->inner + m->block - 1) / m->block;
    for (int tap = 0, lines = 0; tap < j->side; tap++) {
        if (tap > 0 && tap < j->step)
            lines += NAME(phase_lines)(j, rows, tap - 1);
        tap_at[tap] = tap < j->step ? (size_t)lines * w + (p0 - row * w) : tap_at[tap - j->step] + line;
    }
    for (int r = 0; r < vectors && images > 1; r++) places[r] = r / per_image * (int)each + r % per_image * VW;
    for (int i = 0; i < images && whole; i++)
        NAME(gather_numbers)(j, m, image + i, first, numbers + i * room.numbers_each, room.number_stride, room.numbers_each);
    for (int column = 0; column < j->side; column++) { /* one after the other: their panels would not fit the second-level cache */
        int shift = column - j->padding;
        if (beside) {
            NAME(places_side_by_side)(j, images, NAME(phase_lines)(j, rows, 0), shift, at, room.numbers_each, unit * VW);
            NAME(pairs_of)(1, j, m, image, at, numbers, room.number_stride, (char *)panel, stride, images * each);
        } else if (!plain)
            NAME(places_of)(j, row, rows, column, whole ? first : 0, at, unit * VW);
        else if (whole)
            for (size_t p = 0, x = 0; p < each + unit * VW; p++, x = x + 1 < (size_t)w ? x + 1 : 0)
                at[p] = (int)x + shift >= 0 && (int)x + shift < w ? -1 : 0;
        for (int i = 0; i < images && !beside; i++) {
            if (whole)
                NAME(pair_numbers)(j, m, image + i, shift, at, numbers + i * room.numbers_each, room.number_stride,
                                   (char *)panel + i * each * lane_bytes(m), stride, each);
            for (int c = 0; c < m->inner && !whole; c++) {
                float *to = panel + c * stride + i * each;
                if (plain)
                    NAME(gather_row)(j, m, image + i, c, row, rows, shift, to);
                else
                    NAME(gather_places)(j, m, image + i, c, at, to, each);
            }
        }
        NAME(multiply)(m, 0, m->rows / m->v, 0, blocks, panel, stride, tap_at, column, j->side, images > 1 && !beside ? places : NULL, out,
                       out_stride, vectors);
    }
    if (beside) {
        NAME(spread)(j, m, image, images, out, out_stride);
        return;
    }
    for (int i = 0; i < images; i++) {
        vf space[3] = {{0}};
        products known = {0};
        if (whole)
            known = products_of(m, NAME(of_image)(j, m, image + i, space));
        for (int o = 0; o < m->rows; o++) {
            float *from = out + o * out_stride + i * per_image * VW;
            size_t place = ((image + i) * m->rows + o) * (size_t)area + p0;
            float *floats = j->half ? from : (float *)j->y + place;
            if (m->lanes == BYTES)
                NAME(numbers_of)(BYTES, &known, o, from, space[0], (vi)space[2], floats, count, area);
            else if (m->lanes == CODES)
                NAME(numbers_of)(CODES, &known, o, from, space[0], (vi)space[2], floats, count, area);
            if (j->half) {
                uint16_t *to = (uint16_t *)j->y + place;
                for (int p = 0; p < count; p += VW) {
                    vh bits = __builtin_convertvector(NAME(round16)(NAME(load)(from + p)), vh);
                    if (count - p >= VW)
                        *(vh *)(to + p) = bits;
                    else
                        memcpy(to + p, &bits, (count - p) * 2);
                }
            } else if (!whole)
                memcpy(floats, from, count * 4);
        }
    }
}

/* Where part `part` of an image of `whole` vectors begins: at a pass. */
static int NAME(begins)(const job *j, int whole, int64_t part) {
    int64_t at = NAME(passes)(&j->first, whole) * part / j->per_image * NAME(pass)(&j->first);
    return (int)(at < whole ? at : whole);
}

/* Cut the job into tiles of about j->vectors vectors, so that every thread gets as many, and say what one tile needs. */
static size_t NAME(plan)(job *j, int threads) {
    const matrix *a = &j->first, *b = &j->second;
    size_t inner = panel_rows(a);
    int most = j->vectors;
    if (j->kind == 2) {
        int area = j->out_height * j->out_width, whole = NAME(vectors_of)(j, area);
        j->images_per_tile = most / whole;
        if (j->images_per_tile > (j->tokens + threads - 1) / threads)
            j->images_per_tile = (int)((j->tokens + threads - 1) / threads);
        if (j->images_per_tile < 1)
            j->images_per_tile = 1;
        if (j->images_per_tile * whole > PLACES)
            j->images_per_tile = 1;
        j->per_image = j->images_per_tile > 1 ? 1 : (whole + most - 1) / most;
        int passes = NAME(passes)(a, whole);
        j->per_image = j->per_image < passes ? j->per_image : passes;
        while (j->images_per_tile == 1 && j->tokens * j->per_image % threads && j->per_image < passes)
            j->per_image++; /* every thread gets as many */
        j->tiles = (j->tokens + j->images_per_tile - 1) / j->images_per_tile * j->per_image;
        int vectors = (int)((passes + j->per_image - 1) / j->per_image) * NAME(pass)(a);
        if (j->images_per_tile > 1)
            vectors = whole * j->images_per_tile;
        int images = j->images_per_tile, rows = images > 1 ? j->out_height : vectors * VW / j->out_width + 2, unit = unit_of(a);
        const NAME(room) room = NAME(room_of)(j, rows, images);
        size_t floats = inner * room.stride * lane_bytes(a) / 4 + (size_t)a->rows * vectors * VW + images * room.each + 2 * unit * VW;
        if (whole_numbers(a))
            floats += (size_t)(a->inner / 4 * NUMBER_ROWS(a)) * room.number_stride;
        return floats * 4;
    }
    int64_t units = NAME(units_of)(j);
    most = most > unit_of(a) ? most / unit_of(a) : 1;
    j->tiles = (units + most - 1) / most;
    if (j->tiles % threads && units >= (j->tiles / threads + 1) * threads)
        j->tiles = (j->tiles / threads + 1) * threads;
    else if (j->tiles < threads)
        j->tiles = units; /* fewer than there are threads: a vector each is sooner done than some of them in a few tiles */
    size_t stride = (size_t)((units + j->tiles - 1) / j->tiles) * unit_of(a) * VW;
    size_t rows = inner * lane_bytes(a) / 4 + a->rows + (whole_numbers(a) ? 3 : 0);
    if (j->kind == 1)
        rows = inner * lane_bytes(a) / 4 + hidden_chunk(b) + (b->lanes ? hidden_chunk(b) / 4 * rows_of_four(b) * lane_bytes(b) / 4 : 0) + b->rows +
               (whole_numbers(b) ? b->rows + 6 : 0);
    return rows * stride * 4;
}

static void NAME(work)(void *argument) {
    job *j = argument;
    float *scratch = scratch_of_this_thread(j->scratch_bytes);
    if (scratch == NULL) {
        j->failed = 1;
        return;
    }
    for (int64_t tile; (tile = next_part(j->queues)) >= 0;) {
        if (j->kind == 2) {
            int64_t image = tile / j->per_image * j->images_per_tile, part = tile % j->per_image;
            int area = j->out_height * j->out_width, whole = NAME(vectors_of)(j, area);
            int p0 = NAME(begins)(j, whole, part) * VW, p1 = NAME(begins)(j, whole, part + 1) * VW;
            int images = j->tokens - image < j->images_per_tile ? (int)(j->tokens - image) : j->images_per_tile;
            NAME(conv_tile)(j, image, images, p0, (p1 < area ? p1 : area) - p0, scratch);
            continue;
        }
        int64_t units = NAME(units_of)(j), width = unit_of(&j->first) * VW;
        int64_t t0 = units * tile / j->tiles * width, t1 = units * (tile + 1) / j->tiles * width;
        int count = (int)((t1 < j->tokens ? t1 : j->tokens) - t0);
        if (j->kind == 1)
            NAME(pair_tile)(j, t0, count, scratch);
        else
            NAME(linear_tile)(j, t0, count, scratch);
    }
}

/* A vector of a row of which `left` numbers are left: zeros after its end. */
INLINE vu NAME(floats)(const float *p, int left) { return NAME(part)((const char *)p, (ptrdiff_t)left * 4); }

/* --- Attention: a tile of queries is the panel, in lanes; keys, and then values, are what it is multiplied by. --- */

/* out[v][r] (+)= sum over s of w[v * across + s * along] * panel[s][r], for V rows and R vectors. With CODES lanes hold pairs of
 * whole numbers, as in micro, and so do the sums; with BYTES fours of them, those of the panel signed. */
INLINE void NAME(dense)(int V, int R, int lanes, const lane *w, size_t across, size_t along, int steps, const float *panel,
                        float *out, int begin) {
    const size_t stride = R * VW;
    vf acc[4][6];
    UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
        acc[v][r] = begin ? (vf){0} : NAME(load)(out + v * stride + r * VW);
    for (int s = 0; s < steps; s++, w += along, panel += stride) {
        vf x[6];
        UNROLL for (int r = 0; r < R; r++) x[r] = NAME(load)(panel + r * VW);
        UNROLL for (int v = 0; v < V; v++) {
            vf b = (vf)(w[v * across] | (vu){0});
            UNROLL for (int r = 0; r < R; r++) {
#ifdef MADD_AT
                if (lanes == CODES && r == 0 && V * R == 12)
                    acc[v][r] = (vf)MADD_AT((vi)acc[v][r], (vi)b, panel);
                else
#endif
#ifdef DPBUSD
                if (lanes == BYTES)
                    acc[v][r] = (vf)DPBUSD((vi)acc[v][r], (vi)b, (vi)x[r]);
                else
#endif
                if (lanes == CODES)
                    acc[v][r] = (vf)MADD((vi)acc[v][r], (vi)x[r], (vi)b);
                else
                    acc[v][r] += b * x[r];
            }
        }
    }
    UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) NAME(store)(out + v * stride + r * VW, acc[v][r]);
}

/* The same for any number of rows, of which four at a time share a load, and R4 vectors, or one less. */
INLINE void NAME(rows_of)(int R, int lanes, const lane *w, size_t across, size_t along, int rows, int steps, const float *panel,
                          float *out, int begin) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        NAME(dense)(4, R, lanes, w + row * across, across, along, steps, panel, out + row * R * VW, begin);
    for (; row < rows; row++)
        NAME(dense)(1, R, lanes, w + row * across, across, along, steps, panel, out + row * R * VW, begin);
}
static ALONE void NAME(product)(int R, int lanes, const lane *w, size_t across, size_t along, int rows, int steps, const float *panel,
                                float *out, int begin) {
#ifdef DPBUSD
    if (lanes == BYTES && R == R4)
        NAME(rows_of)(R4, BYTES, w, across, along, rows, steps, panel, out, begin);
    else if (lanes == BYTES)
        NAME(rows_of)(R4 - 1, BYTES, w, across, along, rows, steps, panel, out, begin);
    else
#endif
    if (lanes == CODES && R == R4)
        NAME(rows_of)(R4, CODES, w, across, along, rows, steps, panel, out, begin);
    else if (lanes == CODES)
        NAME(rows_of)(R4 - 1, CODES, w, across, along, rows, steps, panel, out, begin);
    else if (R == R4)
        NAME(rows_of)(R4, FLOATS, w, across, along, rows, steps, panel, out, begin);
    else
        NAME(rows_of)(R4 - 1, FLOATS, w, across, along, rows, steps, panel, out, begin);
}

/* Channels of a lane of queries and keys, and the steps of their product. */
static int NAME(together)(const attention *a) { return a->lanes == BYTES ? 4 : a->lanes == CODES ? 2 : 1; }
static int NAME(score_steps)(const attention *a) { return (a->channels + NAME(together)(a) - 1) / NAME(together)(a); }

/* `count` queries, of at most R vectors, into the panel, channel by channel, such that the softmax of their scores has powers of two.
 * As whole numbers, pairs or fours of channels to a lane, and what a code of each query stands for goes to `unit`. */
static ALONE void NAME(queries)(int R, const attention *a, const float *q, int count, float *panel, float *unit) {
    const int codes = a->lanes != FLOATS, together = NAME(together)(a), steps = NAME(score_steps)(a), stride = R * VW;
    const float scale = a->scale * LOG2_E, sign = a->scale < 0 ? -1.0f : 1.0f;
    for (int t = 0; t < stride; t += VW) {
        vf largest = {0}, inverse;
        for (int c = 0; c < a->channels; c += VW) {
            vu r[VW];
            UNROLL for (int i = 0; i < VW; i++) {
                __builtin_prefetch(q + (t + i + AHEAD) * a->q_at[2] + c);
                r[i] = t + i < count ? NAME(floats)(q + (t + i) * a->q_at[2] + c, a->channels - c) : (vu){0};
            }
            NAME(transpose)(r);
            for (int i = 0; i < VW && c + i < a->channels; i++) {
                NAME(store)(panel + (c + i) * stride + t, (vf)r[i] * (codes ? sign : scale));
                largest = NAME(larger)(largest, (vf)r[i]);
            }
        }
        if (!codes)
            continue;
        for (int c = a->channels; c < steps * together; c++) NAME(store)(panel + c * stride + t, (vf){0});
        NAME(store)(unit + t, largest);
        scales_of(unit + t, (float *)&inverse, VW, a->largest);
        for (int s = 0; s < steps && together == 4; s++) {
            vf four[4];
            UNROLL for (int i = 0; i < 4; i++) four[i] = NAME(load)(panel + (4 * s + i) * stride + t);
            NAME(store)(panel + s * stride + t, (vf)NAME(bytes_of)(four, inverse, (vu){0}));
        }
        for (int s = 0; s < steps && together == 2; s++) {
            vu low = NAME(code)(NAME(load)(panel + 2 * s * stride + t), inverse);
            vu high = NAME(code)(NAME(load)(panel + (2 * s + 1) * stride + t), inverse);
            NAME(store)(panel + s * stride + t, (vf)(low | (high << 16)));
        }
        NAME(store)(unit + t, NAME(load)(unit + t) * (scale * sign));
    }
}

/* Scores of `some` keys in R vectors become shares of the largest so far. What was summed before is to shrink by `less`; `total`
 * gets the sum of the shares. */
INLINE void NAME(shares)(int R, float *scores, int some, vf *most, vf *less, vf *total) {
    const int stride = R * VW;
    UNROLL for (int r = 0; r < R; r++) less[r] = most[r];
    for (int i = 0; i < some; i++)
        UNROLL for (int r = 0; r < R; r++) most[r] = NAME(max)(most[r], NAME(load)(scores + i * stride + r * VW));
    UNROLL for (int r = 0; r < R; r++) {
        less[r] = NAME(power)(less[r] - most[r]);
        total[r] *= less[r];
    }
    for (int i = 0; i < some; i++) {
        UNROLL for (int r = 0; r < R; r++) {
            float *at = scores + i * stride + r * VW;
            vf share = NAME(power)(NAME(load)(at) - most[r]);
            NAME(store)(at, share);
            total[r] += share;
        }
    }
}

/* The same of scores that are whole numbers of 31 bits, of which one stands for `unit`; shares are codes, pair of keys by pair. */
INLINE void NAME(share_codes)(int R, float *scores, int some, const float *unit, vi *most, vf *less, vf *total) {
    const int stride = R * VW;
    const vs ones = (vs){0} + 1;
    vi sum[6], before[6];
    UNROLL for (int r = 0; r < R; r++) before[r] = most[r], sum[r] = (vi){0};
    for (int i = 0; i < some; i++)
        UNROLL for (int r = 0; r < R; r++) most[r] = MOST(most[r], *(const vi *)(scores + i * stride + r * VW));
    UNROLL for (int r = 0; r < R; r++)
        less[r] = NAME(power)(__builtin_convertvector(before[r] - most[r], vf) * NAME(load)(unit + r * VW));
    for (int i = 0; i < some; i += 2) {
        UNROLL for (int r = 0; r < R; r++) {
            const vi *at = (const vi *)(scores + i * stride + r * VW);
            vf one = NAME(load)(unit + r * VW);
            vu pair = (vu)(NAME(share)(__builtin_convertvector(*at - most[r], vf) * one) + MAGIC) & 0xffff;
            if (i + 1 < some)
                pair |= (vu)(NAME(share)(__builtin_convertvector(at[R] - most[r], vf) * one) + MAGIC) << 16;
            NAME(store)(scores + i / 2 * stride + r * VW, (vf)pair);
            sum[r] = MADD(sum[r], (vi)pair, (vi)ones);
        }
    }
    UNROLL for (int r = 0; r < R; r++) total[r] = total[r] * less[r] + __builtin_convertvector(sum[r], vf);
}

/* A tile of `count` queries, in R vectors, of one head of one image through all of its keys, block of keys by block: scores become
 * shares of the largest so far, and what was summed shrinks where a larger one is found. */
INLINE void NAME(attention_tile)(int R, int lanes, const attention *a, const float *q, const head *h, float *y, int count,
                                 float *scratch) {
    const int codes = lanes != FLOATS, wide = a->value_channels, stride = R * VW, steps = NAME(score_steps)(a);
    float *panel = scratch, *scores = panel + (a->channels + 3) * stride, *out = scores + a->block * stride;
    float *sums = codes ? out + wide * stride : out, *unit = out + 2 * wide * stride;
    vf most[6], less[6], total[6];
    vi most_codes[6];
    NAME(queries)(R, a, q, count, panel, unit);
    UNROLL for (int r = 0; r < R; r++) {
        most[r] = NAME(all)(-INFINITY), most_codes[r] = (vi){0} - LARGEST_SCORE, total[r] = (vf){0};
        if (codes)
            NAME(store)(unit + r * VW, NAME(load)(unit + r * VW) * h->key_scale);
    }
    for (int k0 = 0; k0 < a->keys; k0 += a->block) {
        int some = a->keys - k0 < a->block ? a->keys - k0 : a->block, lines = codes ? (some + 1) / 2 : some;
        NAME(product)(R, lanes, h->keys + (size_t)k0 * steps, steps, 1, some, steps, panel, scores, 1);
        if (codes)
            NAME(share_codes)(R, scores, some, unit, most_codes, less, total);
        else
            NAME(shares)(R, scores, some, most, less, total);
        const lane *values = h->values + (size_t)(codes ? k0 / 2 : k0) * wide;
        for (int c = 0; k0 && c < wide && !codes; c++) {
            UNROLL for (int r = 0; r < R; r++) {
                float *at = out + c * stride + r * VW;
                NAME(store)(at, NAME(load)(at) * less[r]);
            }
        }
        NAME(product)(R, codes ? CODES : FLOATS, values, 1, wide, wide, lines, scores, sums, codes || k0 == 0);
        for (int c = 0; codes && c < wide; c++) {
            UNROLL for (int r = 0; r < R; r++) {
                float *at = out + c * stride + r * VW;
                vf x = __builtin_convertvector(*(const vi *)(sums + c * stride + r * VW), vf);
                if (k0)
                    x += NAME(load)(at) * less[r];
                NAME(store)(at, x);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        vf share = 1.0f / total[r];
        if (codes)
            share += NAME(load)(unit + r * VW) - NAME(load)(unit + r * VW); /* which is no number where a query or a key is none */
        for (int c = 0; c < wide; c += VW) {
            vu x[VW];
            UNROLL for (int i = 0; i < VW; i++) {
                float unit_of_row = codes && c + i < wide ? h->value_scale[c + i] : 1.0f;
                x[i] = c + i < wide ? (vu)(NAME(load)(out + (c + i) * stride + r * VW) * share * unit_of_row) : (vu){0};
            }
            NAME(transpose)(x);
            UNROLL for (int i = 0; i < VW; i++) {
                if (r * VW + i < count)
                    NAME(keep)(y + (size_t)(r * VW + i) * a->heads * wide + c, x[i], wide - c);
            }
        }
    }
}

/* `count` rows of `wide` numbers that lie `apart`, one after the other. */
INLINE void NAME(lines)(lane *to, const float *from, int64_t count, int64_t apart, int wide) {
    for (; count; count--, from += apart, to += wide) {
        int c = 0;
        for (; c + VW <= wide; c += VW) NAME(store)((float *)to + c, NAME(load)(from + c));
        for (; c < wide; c++) ((float *)to)[c] = from[c];
    }
}

#ifdef DPBUSD
/* The mean of each channel of the keys of a head, and the largest magnitude of what differs from it. */
static vf NAME(mean_key)(const attention *a, const float *k, float *mean) {
    const vf share = NAME(all)(1.0f / (float)a->keys);
    vf largest = {0};
    for (int c = 0; c < a->channels; c += 4 * VW) {
        vf sum[4] = {{0}}, low[4], high[4];
        UNROLL for (int r = 0; r < 4; r++) low[r] = NAME(all)(INFINITY), high[r] = NAME(all)(-INFINITY);
        for (int64_t i = 0; i < a->keys; i++)
            UNROLL for (int r = 0; r < 4; r++) {
                const float *at = k + i * a->k_at[2] + c + r * VW;
                __builtin_prefetch(at + AHEAD * a->k_at[2]);
                vf x = (vf)NAME(floats)(at, a->channels - c - r * VW);
                sum[r] += x * share, low[r] = NAME(min)(low[r], x), high[r] = NAME(max)(high[r], x);
            }
        for (int r = 0; r < 4 && c + r * VW < a->channels; r++) {
            NAME(keep)(mean + c + r * VW, (vu)sum[r], a->channels - c - r * VW);
            largest = NAME(larger)(NAME(larger)(largest, low[r] - sum[r]), high[r] - sum[r]);
        }
    }
    return largest;
}

/* A key's codes, less `mean`, as bytes above CENTRE_OF_KEYS, fours of channels to a lane. */
INLINE void NAME(key_bytes)(const float *k, const float *mean, int channels, vf inverse, uint8_t *to) {
    for (int c = 0; c < channels; c += VW) {
        int left = channels - c;
        vu codes = NAME(code)((vf)NAME(floats)(k + c, left) - (vf)NAME(floats)(mean + c, left), inverse) + CENTRE_OF_KEYS;
        vb narrow = __builtin_convertvector(codes, vb);
        if (left >= VW)
            *(vb *)(to + c) = narrow;
        else
            memcpy(to + c, &narrow, (left + 3) / 4 * 4);
    }
}

/* The keys of a head as such, `steps` lanes each, and what they stand for. */
static void NAME(keys_as_bytes)(const attention *a, const float *k, int steps, head *h) {
    float inverse;
    h->key_scale = NAME(largest_of)(NAME(mean_key)(a, k, h->mean));
    scales_of(&h->key_scale, &inverse, 1, a->largest);
    for (int64_t i = 0; i < a->keys; i++)
        NAME(key_bytes)(k + i * a->k_at[2], h->mean, a->channels, NAME(all)(inverse), (uint8_t *)(h->keys + i * steps));
}
#endif

/* The same as codes, pairs of channels to a lane. */
static void NAME(keys_as_codes)(const attention *a, const float *k, int steps, head *h) {
    const int channels = a->channels;
    vf largest = {0};
    for (int64_t i = 0; i < a->keys; i++)
        for (int c = 0; c < channels; c += VW) {
            __builtin_prefetch(k + (i + AHEAD) * a->k_at[2] + c); /* rows often lie further apart than the processor looks ahead */
            largest = NAME(larger)(largest, (vf)NAME(floats)(k + i * a->k_at[2] + c, channels - c));
        }
    float inverse;
    h->key_scale = NAME(largest_of)(largest);
    scales_of(&h->key_scale, &inverse, 1, a->largest);
    for (int64_t i = 0; i < a->keys; i++) {
        for (int c = 0; c < 2 * steps; c += VW) {
            vu codes = NAME(code)((vf)NAME(floats)(k + i * a->k_at[2] + c, channels - c), NAME(all)(inverse));
            vh narrow = __builtin_convertvector(codes, vh);
            int left = 2 * steps - c;
            if (left >= VW)
                *(vh *)((uint16_t *)(h->keys + i * steps) + c) = narrow;
            else
                memcpy((uint16_t *)(h->keys + i * steps) + c, &narrow, left * 2);
        }
    }
}

/* The keys and values of one head as lines that follow each other: as they are, or as codes, of a key's pairs or fours of channels, and
 * of a channel's pairs of keys, all keys with one scale, each channel of the values with one. What all scores of a query have in common
 * its shares do not depend on: so bytes of keys are of what differs from their mean, and have what they are above. */
static ALONE void NAME(keys_and_values)(const attention *a, const float *k, const float *v, head *h) {
    const int channels = a->channels, wide = a->value_channels, steps = NAME(score_steps)(a);
    if (a->lanes == FLOATS) {
        NAME(lines)(h->keys, k, a->keys, a->k_at[2], channels);
        NAME(lines)(h->values, v, a->keys, a->v_at[2], wide);
        return;
    }
#ifdef DPBUSD
    if (a->lanes == BYTES)
        NAME(keys_as_bytes)(a, k, steps, h);
    else
#endif
        NAME(keys_as_codes)(a, k, steps, h);
    for (int c = 0; c < wide; c += 4 * VW) { /* as many channels of a value as a line of the cache has, and more */
        vf most[4] = {{0}};
        for (int64_t i = 0; i < a->keys; i++)
            UNROLL for (int r = 0; r < 4; r++) {
                const float *at = v + i * a->v_at[2] + c + r * VW;
                __builtin_prefetch(at + AHEAD * a->v_at[2]);
                most[r] = NAME(larger)(most[r], (vf)NAME(floats)(at, wide - c - r * VW));
            }
        for (int r = 0; r < 4 && c + r * VW < wide; r++) NAME(keep)(h->value_scale + c + r * VW, (vu)most[r], wide - c - r * VW);
    }
    scales_of(h->value_scale, h->value_inverse, wide, VALUES);
    for (int64_t i = 0; i < a->keys; i += 2) {
        const float *value = v + i * a->v_at[2], *next = i + 1 < a->keys ? value + a->v_at[2] : NULL;
        for (int c = 0; c < wide; c += VW) {
            vf inverse_of = (vf)NAME(floats)(h->value_inverse + c, wide - c);
            vu low = NAME(code)((vf)NAME(floats)(value + c, wide - c), inverse_of);
            vu high = next ? NAME(code)((vf)NAME(floats)(next + c, wide - c), inverse_of) : (vu){0};
            NAME(keep)((float *)(h->values + i / 2 * wide + c), low | (high << 16), wide - c);
        }
    }
}

/* Parts of the queries of a head. */
static void NAME(attend)(void *argument) {
    attention *a = argument;
    size_t keys = ((size_t)a->keys + 1) * (a->channels + a->value_channels + 1) + 2 * (size_t)a->value_channels + a->channels;
    size_t tile = (size_t)(a->channels + 3 + a->block + 2 * a->value_channels + 1) * R4 * VW;
    float *buffer = scratch_of_this_thread((tile + keys) * 4);
    if (buffer == NULL) {
        a->failed = 1;
        return;
    }
    head h = {.keys = (lane *)(buffer + tile)};
    h.values = h.keys + ((size_t)a->keys + 1) * (a->channels + 1);
    h.value_scale = (float *)(h.values + ((size_t)a->keys + 1) * a->value_channels);
    h.value_inverse = h.value_scale + a->value_channels;
    h.mean = h.value_inverse + a->value_channels;
    int64_t vectors = (a->queries + VW - 1) / VW;
    for (int64_t next; (next = next_part(a->queues)) >= 0;) {
        int64_t part = next % a->parts, which = next / a->parts % a->heads, image = next / a->parts / a->heads;
        int64_t from = vectors * part / a->parts * VW, end = vectors * (part + 1) / a->parts * VW;
        end = end < a->queries ? end : a->queries;
        const float *q = a->q + image * a->q_at[0] + which * a->q_at[1];
        NAME(keys_and_values)(a, a->k + image * a->k_at[0] + which * a->k_at[1], a->v + image * a->v_at[0] + which * a->v_at[1], &h);
        for (int64_t t = from, left, R; t < end; t += R * VW) { /* in tiles of R4 vectors, or one less while that takes no more of them */
            left = (end - t + VW - 1) / VW, R = left % R4 ? R4 - 1 : R4;
            int count = (int)(end - t < R * VW ? end - t : R * VW);
            const float *from_q = q + t * a->q_at[2];
            float *y = a->y + ((image * a->queries + t) * a->heads + which) * a->value_channels;
#ifdef DPBUSD
            if (a->lanes == BYTES && R == R4)
                NAME(attention_tile)(R4, BYTES, a, from_q, &h, y, count, buffer);
            else if (a->lanes == BYTES)
                NAME(attention_tile)(R4 - 1, BYTES, a, from_q, &h, y, count, buffer);
            else
#endif
            if (a->lanes == CODES && R == R4)
                NAME(attention_tile)(R4, CODES, a, from_q, &h, y, count, buffer);
            else if (a->lanes == CODES)
                NAME(attention_tile)(R4 - 1, CODES, a, from_q, &h, y, count, buffer);
            else if (R == R4)
                NAME(attention_tile)(R4, FLOATS, a, from_q, &h, y, count, buffer);
            else
                NAME(attention_tile)(R4 - 1, FLOATS, a, from_q, &h, y, count, buffer);
        }
    }
}

#undef vf
#undef vi
#undef vu
#undef vh
#undef vb
#undef vs
#undef vus
#undef NUMBER_ROWS
#undef BEFORE
#undef CENTRE
#undef MICRO_BYTES
#undef FOUR
#undef BYTE_ENTRY
#undef BYTE_VECTORS
#undef UPTO_BYTES
#undef MICRO
#undef MICROS
#undef ENTRY
#undef EXCHANGE
