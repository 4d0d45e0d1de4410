// The gradient of the weights of a convolution of pictures: for each tap a product of what came out's gradient with what
// went in, over all places, summed up in registers. Samples are copied before, as they are read, with zeros around. The
// weights are shared by the threads, so every number is the same sum in the same order for any number of them.
#include "native.h"

typedef struct {
    int64_t batch, in, out, kernel, stride, padding; // C, C'
    int64_t height, width, out_height, out_width;
    int64_t some;                                    // samples that are copied at once
    const float *x, *gradient;                       // (B, h, w, C), (B, h', w', C')
    int64_t x_batch, x_line, x_place, gradient_batch, gradient_line, gradient_place; // strides
    float *by_weight;
    int64_t by_out_stride, by_in_stride, by_line_stride, by_tap_stride; // of that, (C', C, k, k)
    float *scratch;                                  // pictures_scratch() numbers
} pictures;

int64_t pictures_size(void) { return sizeof(pictures); }

// Lines and columns of a sample with what is around it.
static int64_t tall(const pictures *one) { return (one->out_height - 1) * one->stride + one->kernel; }
static int64_t wide(const pictures *one) { return (one->out_width - 1) * one->stride + one->kernel; }

static int64_t seen_numbers(const pictures *one) {
    return blocks_of(one->in, PANEL) * one->some * tall(one) * wide(one) * PANEL;
}
static int64_t came_numbers(const pictures *one) {
    return blocks_of(one->out, TALL) * one->some * one->out_height * one->out_width * TALL;
}
static int64_t sum_numbers(const pictures *one) {
    return blocks_of(one->out, TALL) * blocks_of(one->in, PANEL) * one->kernel * one->kernel * TALL * PANEL;
}

int64_t pictures_scratch(const pictures *one) { return seen_numbers(one) + came_numbers(one) + sum_numbers(one); }

// Copy the channels of one line, PANEL of them side by side: (blocks, ..., w, PANEL), `apart` numbers from block to block.
static void copy_line(const float *from, int64_t place, int64_t count, int64_t channels, float *to, int64_t apart) {
    for (int64_t w = 0; w < count; w++, from += place, to += PANEL) {
        int64_t c = 0;
        for (; c + PANEL <= channels; c += PANEL) memcpy(to + c / PANEL * apart, from + c, sizeof(float) * PANEL);
        if (c < channels) {
            float *last = to + c / PANEL * apart;
            memcpy(last, from + c, sizeof(float) * (channels - c));
            memset(last + channels - c, 0, sizeof(float) * (PANEL - channels + c));
        }
    }
}

// Copy what one sample went in with, zeros around it.
static void copy_seen(const pictures *one, int64_t batch, float *to) {
    int64_t lines = tall(one), columns = wide(one), apart = one->some * lines * columns * PANEL;
    int64_t blocks = blocks_of(one->in, PANEL), edge = one->padding < columns ? one->padding : columns;
    int64_t count = columns - edge < one->width ? columns - edge : one->width; // columns that are seen
    for (int64_t y = 0; y < lines; y++, to += columns * PANEL) {
        int64_t line = y - one->padding;
        int64_t zeros = line < 0 || line >= one->height ? columns : edge, after = zeros == columns ? 0 : columns - edge - count;
        for (int64_t block = 0; block < blocks; block++) {
            memset(to + block * apart, 0, sizeof(float) * zeros * PANEL);
            memset(to + block * apart + (columns - after) * PANEL, 0, sizeof(float) * after * PANEL);
        }
        if (zeros < columns)
            copy_line(one->x + batch * one->x_batch + line * one->x_line, one->x_place, count, one->in, to + edge * PANEL, apart);
    }
}

// Copy the gradient of what came out of one sample, TALL channels side by side.
static void copy_came(const pictures *one, int64_t batch, float *to) {
    int64_t places = one->out_height * one->out_width, apart = one->some * places * TALL;
    for (int64_t y = 0; y < one->out_height; y++)
        for (int64_t w = 0; w < one->out_width; w++, to += TALL) {
            const float *from = one->gradient + batch * one->gradient_batch + y * one->gradient_line + w * one->gradient_place;
            int64_t c = 0;
            for (; c + TALL <= one->out; c += TALL) memcpy(to + c / TALL * apart, from + c, sizeof(float) * TALL);
            if (c < one->out) {
                float *last = to + c / TALL * apart;
                for (int64_t i = 0; i < TALL; i++) last[i] = c + i < one->out ? from[c + i] : 0;
            }
        }
}

// Add the products of TALL channels with PANEL others, at one tap of some samples.
static void add_tap(const pictures *one, int64_t samples, const float *came, const float *seen, float *sums) {
    vector own[2 * TALL] = {0};
    int64_t step = one->stride * PANEL, columns = wide(one), line = one->stride * columns * PANEL;
    int64_t sample = tall(one) * columns * PANEL;
    for (int64_t batch = 0; batch < samples; batch++)
        for (int64_t y = 0; y < one->out_height; y++) {
            const float *at = seen + batch * sample + y * line;
            for (int64_t w = 0; w < one->out_width; w++, at += step, came += TALL) {
                vector left = *(const vector *)at, right = *(const vector *)(at + WIDE);
                for (int i = 0; i < TALL; i++) {
                    own[2 * i] += left * came[i];
                    own[2 * i + 1] += right * came[i];
                }
            }
        }
    for (int i = 0; i < 2 * TALL; i++) ((vector *)sums)[i] += own[i];
}

void weigh_pictures(const pictures *one, int64_t threads) {
    int64_t ins = blocks_of(one->in, PANEL), outs = blocks_of(one->out, TALL), taps = one->kernel * one->kernel;
    int64_t columns = wide(one), places = one->out_height * one->out_width, tasks = ins * outs;
    float *seen = one->scratch, *came = seen + seen_numbers(one), *sums = came + came_numbers(one);
    IN_PARALLEL {
        PART
        int64_t from = tasks * part / parts, to = tasks * (part + 1) / parts;
        memset(sums + from * taps * TALL * PANEL, 0, sizeof(float) * (to - from) * taps * TALL * PANEL);
        for (int64_t first = 0; first < one->batch; first += one->some) {
            int64_t samples = one->batch - first < one->some ? one->batch - first : one->some;
            for (int64_t i = samples * part / parts; i < samples * (part + 1) / parts; i++) {
                copy_seen(one, first + i, seen + i * tall(one) * columns * PANEL);
                copy_came(one, first + i, came + i * places * TALL);
            }
            WAIT
            for (int64_t task = from; task < to; task++) {
                const float *own_came = came + task / ins * one->some * places * TALL;
                const float *own_seen = seen + task % ins * one->some * tall(one) * columns * PANEL;
                float *own = sums + task * taps * TALL * PANEL;
                for (int64_t tap = 0; tap < taps; tap++, own += TALL * PANEL)
                    add_tap(one, samples, own_came, own_seen + (tap / one->kernel * columns + tap % one->kernel) * PANEL, own);
            }
            WAIT
        }
        for (int64_t task = from; task < to; task++) {
            int64_t first_out = task / ins * TALL, first_in = task % ins * PANEL;
            int64_t high = one->out - first_out < TALL ? one->out - first_out : TALL;
            int64_t count = one->in - first_in < PANEL ? one->in - first_in : PANEL;
            const float *own = sums + task * taps * TALL * PANEL;
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t i = 0; i < TALL; i++, own += PANEL) {
                    if (i >= high) continue;
                    float *at = one->by_weight + (first_out + i) * one->by_out_stride + first_in * one->by_in_stride
                        + tap / one->kernel * one->by_line_stride + tap % one->kernel * one->by_tap_stride;
                    for (int64_t c = 0; c < count; c++) at[c * one->by_in_stride] = own[c];
                }
        }
    }
}
