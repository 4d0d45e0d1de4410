// Convolve pictures of few places, as when one robot acts: what each of them sees is laid in a row, and each weight is then
// read, in panels, once for MANY of them.
#include "native.h"

typedef struct {
    int64_t batch, in, height, width;        // of what goes in: (B, h, w, C)
    int64_t out, out_height, out_width;      // of what comes out, (B, h', w', C'), in order
    int64_t kernel, stride, padding, halves; // halves: the weights are in bf16
    const float *x, *weight, *bias;          // weight: (C' / PANEL, kernel, kernel, C, PANEL); bias: (C') or NULL
    int64_t x_batch, x_line, x_place;        // strides
    float *found, *scratch;                  // scratch: (B, h', w', kernel, kernel, C)
} few;

int64_t few_size(void) { return sizeof(few); }

// Lay what some of the places see, with zeros around the picture.
static void unfold(const few *one, int64_t begin, int64_t end) {
    int64_t each = one->out_height * one->out_width;
    float *to = one->scratch + begin * one->kernel * one->kernel * one->in;
    for (int64_t row = begin; row < end; row++) {
        int64_t top = row % each / one->out_width * one->stride - one->padding;
        int64_t left = row % one->out_width * one->stride - one->padding;
        for (int64_t tap = 0; tap < one->kernel * one->kernel; tap++, to += one->in) {
            int64_t y = top + tap / one->kernel, x = left + tap % one->kernel;
            if (y < 0 || y >= one->height || x < 0 || x >= one->width) memset(to, 0, sizeof(float) * one->in);
            else memcpy(to, one->x + row / each * one->x_batch + y * one->x_line + x * one->x_place, sizeof(float) * one->in);
        }
    }
}

// What comes out of some panels, for some places.
static void convolve_some(const few *one, int64_t panel, int64_t last, int64_t begin, int64_t end) {
    int64_t width = one->kernel * one->kernel * one->in;
    for (int64_t first = begin; first < end; first += MANY) {
        int64_t rows = end - first < MANY ? end - first : MANY;
        const float *from[MANY];
        float *to[MANY];
        for (int64_t i = 0; i < rows; i++) {
            from[i] = one->scratch + (first + i) * width;
            to[i] = one->found + (first + i) * one->out;
        }
        multiply_rows(from, to, rows, one->weight, one->halves, width, width, one->out, panel, last, one->bias, 0);
    }
}

// Panels are shared by the threads, and places where there are more threads than panels.
void convolve_few(const few *one, int64_t threads) {
    int64_t all = one->batch * one->out_height * one->out_width, panels = blocks_of(one->out, PANEL);
    IN_PARALLEL {
        PART
        int64_t groups = blocks_of(parts, panels), shares = parts / groups, group = part % groups, share = part / groups;
        unfold(one, all * part / parts, all * (part + 1) / parts);
        WAIT
        if (share < shares)
            convolve_some(one, panels * share / shares, panels * (share + 1) / shares, all * group / groups,
                          all * (group + 1) / groups);
    }
}
