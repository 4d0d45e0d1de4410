// What the operations share: vectors of this CPU, and Mish.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef WIDE // numbers of a vector
#ifdef __AVX512F__
#define WIDE 16
#else
#define WIDE 8
#endif
#endif
#define PANEL (2 * WIDE) // columns of a weight that lie side by side
#define MANY 60          // rows whose sums are kept at once
#if WIDE > 8 // and 32 vectors
#define TALL 11 // channels whose gradients are summed up at once: 64 are 66 so
#define HIGH 6  // times TALL channels, for which windows are copied once
#else
#define TALL 6
#define HIGH 8
#endif
typedef float vector __attribute__((vector_size(4 * WIDE), aligned(4)));

#define INLINE static inline __attribute__((always_inline)) // who calls gives constants, and gets code for those

static inline int64_t blocks_of(int64_t channels, int64_t each) { return (channels + each - 1) / each; }

// What follows IN_PARALLEL is done by each thread, which then knows what its part is; WAIT lets them wait for each other.
#ifdef _OPENMP
#define IN_PARALLEL _Pragma("omp parallel num_threads(threads) if (threads > 1)")
#define PART int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
#define WAIT _Pragma("omp barrier")
#else
#define IN_PARALLEL
#define PART int64_t part = 0, parts = 1;
#define WAIT
#endif

// Up to MANY rows of `width` numbers times panels of a weight, plus the bias, or to what is there already: native.c.
// A panel has `depth` rows, of which the first `width` count. With `halves` the weight is in bf16, the upper half of a
// float32: a panel's row has a word for each two numbers, of the left vector the lower half, of the right one the upper.
void multiply_rows(const float *const *x, float *const *out, int64_t rows, const float *weight, int64_t halves, int64_t width,
                   int64_t depth, int64_t channels, int64_t first_panel, int64_t last_panel, const float *bias, int64_t adds);
static inline int64_t panel_row(int64_t halves) { return halves ? PANEL / 2 : PANEL; } // its length, in words

// The products of TALL numbers of `a`, whose rows are `apart`, with the columns of a panel `b`, added up over rows.
static inline void add_products(const float *a, int64_t apart, const float *b, int64_t rows, vector *sums) {
    vector own[2 * TALL] = {0};
    for (int64_t row = 0; row < rows; row++, a += apart, b += PANEL) {
        vector left = *(const vector *)b, right = *(const vector *)(b + WIDE);
        for (int i = 0; i < TALL; i++) {
            own[2 * i] += left * a[i];
            own[2 * i + 1] += right * a[i];
        }
    }
    for (int i = 0; i < 2 * TALL; i++) sums[i] += own[i];
}

// What is between two convolutions: native_norms.c. What is not there is NULL.
typedef struct {
    int64_t activation, batch, places, channels, groups; // no groups: batch norm
    const float *x, *start, *weight, *bias, *scale, *shift, *added;
    float *out, *moments; // the mean and 1 / deviation: of groups (B, G, 2), of the batch (2, C)
    float *running_mean, *running_variance, *scratch, *samples; // scratch_size() numbers, samples a part of them
    const float *gradient; // of out; then what is found
    float *by_x, *by_scale, *by_shift, *by_added, *by_affine; // by_affine: (3, C), of start, weight and bias
    int64_t x_batch, x_place, out_batch, out_place, added_batch, added_place, gradient_batch, gradient_place; // strides
    int64_t by_x_batch, by_x_place, film_batch, by_film_batch;
    float eps, momentum;
} between;

enum { PLAIN, MISH, RELU };
#define OWN_ROWS 6 // of channels, which each thread has as its scratch; each sample has three, added up at the end
void forwards(const between *one, int64_t batch, float *scratch);
void backwards(const between *one, int64_t batch, float *scratch);
void add_samples(const between *one, int64_t first, int64_t from, int64_t to);

// exp(x) for x <= 0, from -87 on. Source: expf of Cephes, https://www.netlib.org/cephes/
static inline float exponential(float x) {
    float in = x > -87.0f ? x : -87.0f, n = rintf(in * 1.44269504088896341f), y = 1.9875691500e-4f;
    in = in - n * 0.693359375f + n * 2.12194440e-4f;
    y = y * in + 1.3981999507e-3f;
    y = y * in + 8.3334519073e-3f;
    y = y * in + 4.1665795894e-2f;
    y = y * in + 1.6666665459e-1f;
    y = y * in + 5.0000001201e-1f;
    y = y * in * in + in + 1.0f;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)n + 127) << 23};
    return y * power.value;
}

// x tanh(softplus(x)), of e = exp(-|x|), which never overflows; NaN for NaN.
static inline float mish(float x) {
    float e = exponential(-fabsf(x)), up = x < 0 ? e * (e + 2) : 1 + 2 * e, down = x < 0 ? up + 2 : up + 2 * e * e;
    return x * up / down;
}
